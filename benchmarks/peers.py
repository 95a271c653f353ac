"""Time the training steps of other frameworks. `train.py` runs this file.

    python benchmarks/peers.py hf-compiled '{"model": {...}, "batch": 8, "steps": 6,
                                             "precision": "fp32"}'

The interpreter must have the framework installed. The last line of the output is a JSON object with
the end of each step (Unix seconds) and the peak memory in bytes. Every framework uses torch's fused
AdamW, clips gradients at 1.0, reads random tokens from memory, and logs nothing.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Loss = Callable[[Tensor], Tensor]


def transformers_model(model: dict[str, Any]) -> nn.Module:
    """Return a randomly initialised model of transformers, whose attention is torch's SDPA."""
    import transformers

    length, vocabulary = model["max_position_embeddings"], model["vocab_size"]
    if model.get("norm") == "layernorm":
        config: Any = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=model["hidden_size"],
            n_layer=model["num_hidden_layers"],
            n_head=model["num_attention_heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            # the default, gelu_new, computes the same values with several kernels
            activation_function="gelu_pytorch_tanh",
        )
        built: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(**model, tie_word_embeddings=False)
        built = transformers.LlamaForCausalLM(config)
    built.config.use_cache = False
    return built


def litgpt_model(model: dict[str, Any]) -> nn.Module:
    """Return a randomly initialised model of litgpt."""
    from litgpt import GPT, Config

    gpt2 = model.get("norm") == "layernorm"
    kind: dict[str, Any] = {
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "rotary_percentage": 1.0,
    }
    if gpt2:
        # litgpt has no learned positions, so its step does slightly less work
        kind = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"}
        kind |= {"rotary_percentage": 0.0, "gelu_approximate": "tanh"}
    built = GPT(
        Config(
            block_size=model["max_position_embeddings"],
            padded_vocab_size=model["vocab_size"],
            n_layer=model["num_hidden_layers"],
            n_head=model["num_attention_heads"],
            n_embd=model["hidden_size"],
            intermediate_size=model["intermediate_size"],
            parallel_residual=False,
            bias=gpt2,
            **kind,
        )
    )
    if gpt2:  # litgpt's pretraining ties the embedding and the head in this way
        built.transformer.wte.weight = built.lm_head.weight
    return built


def plain_loop(model: nn.Module, loss: Loss, batches: list[Tensor], *, bf16: bool) -> list[float]:
    """Train a step per batch. Return the times at which the steps ended."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    ends = []
    for tokens in batches:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):  # the weights stay fp32
            value = loss(tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        ends.append(time.time())
    return ends


def trainer(model: nn.Module, batches: list[Tensor], *, bf16: bool) -> list[float]:
    """Train a step per batch with transformers' Trainer. Return the ends of the steps."""
    import tempfile

    import transformers

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch.cpu()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            learning_rate=1e-4,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=not CUDA,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]
        ).train()
    return ends


def main() -> None:
    peer, shape = sys.argv[1], json.loads(sys.argv[2])
    model, steps, batch = shape["model"], shape["steps"], shape["batch"]
    bf16 = shape["precision"] == "bf16"
    torch.manual_seed(0)
    is_litgpt = peer.startswith("litgpt")
    # litgpt's loss shifts the labels outside of the model, and so needs one token more
    size = (batch, model["max_position_embeddings"] + is_litgpt)
    batches = [torch.randint(model["vocab_size"], size, device=DEVICE) for _ in range(steps)]
    built = (litgpt_model if is_litgpt else transformers_model)(model).to(DEVICE)
    built.train()
    call: Any = torch.compile(built) if peer.endswith("compiled") else built

    def hf_loss(tokens: Tensor) -> Tensor:
        loss: Tensor = call(input_ids=tokens, labels=tokens).loss
        return loss

    def litgpt_loss(tokens: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        logits = call(tokens[:, :-1].contiguous())
        loss: Tensor = chunked_cross_entropy(logits, tokens[:, 1:].contiguous())
        return loss

    if peer == "hf-trainer":
        ends = trainer(built, batches, bf16=bf16)
    else:
        ends = plain_loop(built, litgpt_loss if is_litgpt else hf_loss, batches, bf16=bf16)
    memory = peak_memory()
    sys.stdout.write("\n" + json.dumps({"ends": ends, "memory": memory}) + "\n")


def peak_memory() -> int:
    """Return the peak bytes of the GPU's allocator, or on a CPU the peak resident memory."""
    if CUDA:
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
