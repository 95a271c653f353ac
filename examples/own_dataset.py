"""Train a tokenizer on your own texts, tokenize them into shards, and train on the shards."""

import json
import sysconfig
from pathlib import Path

import megalite
from data_prep.encode import tokenize
from data_prep.options import TokenizeOptions
from data_prep.train import TrainOptions, train_tokenizer

data = Path("data/own")
texts = data / "texts.jsonl"
if not data.exists():
    data.mkdir(parents=True)
    files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))
    functions = [text for file in files for text in file.read_text("utf-8").split("\n\n\n") if text]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    train_tokenizer(TrainOptions([str(texts)], vocab_size=500, output=data / "tokenizer"))
    tokenize(
        TokenizeOptions(
            [str(texts)],
            str(data / "tokenizer"),
            data / "train",
            valid_fraction=0.2,
            valid_output=data / "valid",
        )
    )

shards = megalite.open_shards(data / "train")
print(len(shards), "documents; the last one begins with", shards[-1][:8])
changes = {"name": "own", "model.vocab_size": 500, "data.train": [{"path": str(data / "train")}]}
run = megalite.pretrain(Path(__file__).with_name("tiny.json"), overrides=changes)
print(megalite.load(run.directory).evaluate(data / "valid"))
