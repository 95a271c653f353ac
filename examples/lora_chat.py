"""Fine-tune LoRA adapters on conversations, and chat with the model.

Run pretrain.py first: it trains the base model.
"""

import json

import megalite

sums = [(first, second) for first in range(12) for second in range(12)]
with open("chat.jsonl", "w", encoding="utf-8") as file:
    for first, second in sums:
        turns = [("user", f"{first} plus {second}?"), ("assistant", str(first + second))]
        messages = [{"role": role, "content": content} for role, content in turns]
        file.write(json.dumps({"messages": messages}) + "\n")
config = {
    "name": "chat",
    "finetune": {
        "task": "sft",
        "data": {"path": "chat.jsonl", "test_fraction": 0.1, "max_length": 128},
        "adapter": {"name": "lora", "rank": 8},
        "epochs": 2,
    },
    "optimizer": {"lr": 1e-2},
    "training": {"global_batch_size": 8, "micro_batch_size": 8},
}
run = megalite.finetune(config, init_from="runs/first")
model = megalite.load(run.directory)
print(model.evaluate())
print(model.generate([{"role": "user", "content": "2 plus 3?"}], 10, temperature=0))
