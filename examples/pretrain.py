"""Pretrain a small model on sources of Python's standard library, and generate text."""

import sysconfig
from pathlib import Path

import megalite
from data_prep.encode import tokenize
from data_prep.options import TokenizeOptions

sources = f"{sysconfig.get_path('stdlib')}/asyncio/*.py"
if not Path("data/tiny").exists():
    tokenize(TokenizeOptions([sources], tokenizer="bytes", output=Path("data/tiny")))
run = megalite.pretrain(Path(__file__).with_name("tiny.json"), overrides={"name": "first"})
print(run.state, run.checkpoint, run.metrics[-1])
print(megalite.load(run.directory).generate("def ", max_new_tokens=50))
