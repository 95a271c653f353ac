"""Compare the speed of greedy decoding with that of transformers, for the same model.

    python benchmarks/generate.py               42 M parameters, prompts of 128, 128 new tokens
    python benchmarks/generate.py --rounds 5 --json results.json

A model with random weights is exported as a Hugging Face folder, which every contestant loads. In
each round, a contestant is a new process. It generates the text twice, and the second time is
measured. All contestants must generate the same tokens.

    megalite        the decoder of megalite.evaluate, as in launcher/generate.py
    hf              `generate` of transformers, eager
    hf-compiled     the same with a static cache and a compiled forward
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
PROMPT, NEW = 128, 128  # tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--only", nargs="+", default=["megalite", "hf", "hf-compiled"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)  # name, batch, folder
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.contestant:
        name, batch, folder = arguments.contestant
        sys.stdout.write(json.dumps(run_contestant(name, int(batch), Path(folder))) + "\n")
        return
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="generate-") as temporary:
        folder = Path(temporary) / "model"
        make_folder(folder)
        for batch in arguments.batch:
            rates: dict[str, list[float]] = {name: [] for name in arguments.only}
            texts: dict[str, Any] = {}
            for _ in range(arguments.rounds):
                for name in rates:
                    command = [sys.executable, __file__, "--contestant", name, str(batch)]
                    done = subprocess.run(
                        [*command, str(folder)], capture_output=True, text=True, check=True
                    )
                    result = json.loads(done.stdout.splitlines()[-1])
                    rates[name].append(batch * NEW / result["seconds"])
                    texts[name] = result["tokens"]
            assert all(text == next(iter(texts.values())) for text in texts.values())
            medians = {name: statistics.median(values) for name, values in rates.items()}
            results[str(batch)] = {"tokens_per_second": medians, "rounds": rates}
            for name, rate in medians.items():
                ratio = medians[arguments.only[0]] / rate
                sys.stdout.write(f"batch {batch}  {name:12} {rate:8.1f} tokens/s  {ratio:5.2f} x\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Export a model with random weights as a Hugging Face folder."""
    from contextlib import nullcontext

    import torch

    from megalite import arch
    from megalite.checkpoint.huggingface import export
    from megalite.config import ModelConfig
    from megalite.model import build, initialize
    from megalite.tokenizers.tokenizer import load_tokenizer

    config = ModelConfig.model_validate(MODEL)
    model = build(config)
    initialize(model, config, seed=1, gather=lambda _: nullcontext())
    rows = {row.name: row for row in arch.parameters(config)}
    tensors = {
        piece.tensor.name: value.detach()[piece.target]
        for name, value in model.named_parameters()
        for piece in arch.pieces(rows[name])
    }

    class InMemory:
        def read(self, tensor: str, _state: str, target: torch.Tensor, box: Any) -> None:
            target.copy_(tensors[tensor][box])

    export(InMemory(), config, load_tokenizer("bytes"), folder)


def run_contestant(name: str, batch: int, folder: Path) -> dict[str, Any]:
    """Generate twice. Return the seconds of the second time, and the tokens of the first text."""
    import torch

    ids = torch.randint(1000, (batch, PROMPT), generator=torch.Generator().manual_seed(3))
    if name == "megalite":
        from megalite.evaluate import Sampling, open_model, sample_ids

        loaded = open_model(folder)

        def generate() -> list[int]:
            steps = list(sample_ids(loaded.decoder(), ids.tolist(), NEW, (), Sampling(0.0)))
            return [row[0] or 0 for row in steps]
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}
        if name == "hf-compiled":
            settings["cache_implementation"] = "static"
            model.forward = torch.compile(model.forward)

        def generate() -> list[int]:
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
            return output[0, PROMPT:].tolist()

    generate()
    began = time.perf_counter()
    tokens = generate()
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    main()
