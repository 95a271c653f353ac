# covers: megalite/evaluate/generate.py megalite/evaluate/harness.py
"""Imported folders give the text of transformers and the results of lm-eval's own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from megalite.errors import CommandError
from megalite.evaluate import Sampling, harness, open_model, stream_text, stream_texts
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.unit.huggingface.test_huggingface_families import exported

transformers = pytest.importorskip("transformers")
GREEDY = Sampling(temperature=0)
BOS, EOS = 256, 257


def folder_of(path: Path, *, bos: bool = False, vocab_size: int = 258, **files: Any) -> Path:
    """Write a small Llama with a byte tokenizer, which adds BOS to texts if `bos`."""
    exported("llama", 2, path, vocab_size=vocab_size)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    name = "<|startoftext|>"
    if bos:
        template = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, BOS)])
        content["post_processor"] = json.loads(template.__getstate__())
    file.write_text(json.dumps(content))
    for stem, content in files.items():
        target = path / f"{stem}.json"
        old = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(old | content))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    return folder_of(path, bos=request.param, vocab_size=264)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]  # type: ignore[arg-type]


def greedy_of_transformers(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(output[0][ids.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    opened = open_model(folder)
    for prompt in ("The cat", "naïve 大"):
        pieces = stream_text(
            opened.decoder(), opened.tokenizer, prompt, max_new_tokens=16, sampling=GREEDY
        )
        assert "".join(pieces) == greedy_of_transformers(folder, prompt, 16)


def test_harness_answers_equal_those_of_its_own_class(grid: Grid, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    ours = harness.make_model(open_model(folder), grid, 3)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype=torch.float32)
    pairs = [("The cat", " sat"), ("", "return"), ("two  ", "end"), ("x" * 60, "y" * 30)]
    results = ours.loglikelihood(requests("loglikelihood", *pairs))
    expected_results = theirs.loglikelihood(requests("loglikelihood", *pairs))
    for (chance, likeliest), (expected, best) in zip(results, expected_results, strict=True):
        assert chance == pytest.approx(expected, abs=1e-3)
        assert likeliest == best
    texts = [("def main(path):" * n,) for n in (1, 9)]
    rolled = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    expected_sums = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert rolled == pytest.approx(expected_sums, abs=1e-3, rel=1e-5)
    prompts = [("The cat", {"until": ["zz"], "max_gen_toks": 9, "do_sample": False})]
    written = ours.generate_until(requests("generate_until", *prompts))
    assert written == theirs.generate_until(requests("generate_until", *prompts))


def test_text_ends_at_any_eos_id_of_the_folder(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "hf")
    opened = open_model(path)
    text = list(opened.tokenizer.encode("The cat"))
    ids = [65, 66, 67]
    for file, ends in (("config", [EOS, 66]), ("generation_config", [EOS, 67])):
        target = path / f"{file}.json"
        content = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(content | {"eos_token_id": ends}))
    tokenizer = load_tokenizer(path)
    assert set(tokenizer.end_ids) == {EOS, 66, 67}

    def says(wanted: list[int]) -> str:
        def logits(seen: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros(1, 258)
            scores[0, wanted[seen.shape[1] - len(text)]] = 1.0
            return scores

        stream = stream_text(logits, tokenizer, "The cat", max_new_tokens=3, sampling=GREEDY)
        return "".join(stream)

    assert says(ids) == "A"
    assert says([65, 67, 65]) == "A"
    assert says([65, 65, 65]) == "AAA"


def test_ids_beyond_the_tokenizer_have_no_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    never = torch.zeros(1, 300)
    never[0, 280] = 1.0
    stream = stream_text(lambda _: never, tokenizer, "x", max_new_tokens=4, sampling=GREEDY)
    assert "".join(stream) == ""


def test_tokenizer_larger_than_the_model_is_a_warning_and_its_tokens_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    added = {"<|im_start|>": 258, "<|im_end|>": 259}
    path = folder_of(tmp_path / "hf")
    (path / "added_tokens.json").write_text(json.dumps(added))
    loaded = open_model(path)
    assert "the tokenizer has 260 ids, the model 258; text with '<|im_start|>' (258)" in caplog.text
    options: dict[str, Any] = {"max_new_tokens": 2, "sampling": GREEDY}
    pieces = stream_texts(loaded.decoder(), loaded.tokenizer, ["plain"], **options)
    assert list(pieces)
    chat = stream_texts(
        loaded.decoder(), loaded.tokenizer, ["<|im_end|>x"], controls=True, **options
    )
    with pytest.raises(CommandError, match=r"'<\|im_end\|>' of id 259, but the model has 258"):
        list(chat)
    with pytest.raises(CommandError, match="of id 259"):
        loaded.check_prompt("a <|im_end|>")


@pytest.mark.parametrize(
    ("settings", "sampling", "length"),
    [
        ({}, {"temperature": 0.0}, 256),
        ({"do_sample": True}, {"temperature": 1.0}, 256),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 3}, {"temperature": 0.0}, 3),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}, 256),
        ({"temperature": "0.7", "max_new_tokens": 3}, {"temperature": 0.7}, 3),
        (
            {"do_sample": True, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2},
            {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2},
            256,
        ),
        ({"top_k": 0, "num_beams": 1, "use_cache": False}, {"temperature": 0.0}, 256),
        ({"max_tokens": 5, "until": None}, {"temperature": 0.0}, 5),
    ],
)
def test_generation_settings_of_a_task_are_used(
    settings: dict[str, Any], sampling: dict[str, Any], length: int
) -> None:
    parsed = harness.GenerationSettings.of(settings)
    assert (parsed.sampling, parsed.max_new_tokens) == (sampling, length)
    assert Sampling(**parsed.sampling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, r"generation_kwargs\.num_beams: 4: only 1 is supported"),
        ({"no_repeat_ngram_size": 2}, "only 0 is supported"),
        ({"best_of": 3}, "best_of: 3: the key is not supported"),
        ({"temperature": "hot"}, "'hot' is no number"),
        ({"do_sample": "yes"}, "give true or false"),
        ({"until": [3]}, "give texts"),
    ],
)
def test_generation_settings_that_are_not_supported_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        harness.GenerationSettings.of(settings)


class Answers:
    """A decoder that answers any prompt with "a"s."""

    continues = False
    suffix_ids = (EOS,)

    def begin(self, prompts: Any, new_tokens: int) -> torch.Tensor:
        self.read = [list(prompt) for prompt in prompts]
        return self.next([])

    def next(self, tokens: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([[97]]), 258)[0].float()


def test_prompt_of_a_model_that_answers_gets_the_suffix_ids(tmp_path: Path) -> None:
    reader, options = Answers(), {"max_new_tokens": 2, "sampling": GREEDY}
    pieces = stream_text(reader, load_tokenizer("bytes"), "hi", **options)  # type: ignore[arg-type]
    assert "".join(pieces) == "aa"
    assert reader.read == [[*b"hi", EOS]]


def test_harness_draws_different_answers_to_repeated_requests(grid: Grid, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    ours = harness.make_model(open_model(folder), grid, 3)
    drawn = ("The cat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    likeliest = ("The cat", {"max_gen_toks": 8})
    first = ours.generate_until(requests("generate_until", *[drawn] * 4))
    assert len(set(first)) > 1
    assert ours.generate_until(requests("generate_until", *[drawn] * 4)) == first
    assert len(set(ours.generate_until(requests("generate_until", *[likeliest] * 3)))) == 1
