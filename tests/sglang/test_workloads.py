# SPDX-License-Identifier: MIT
"""Every point of the serving benchmark is a command line that sglang.bench_serving takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import workloads


@pytest.mark.parametrize("point", workloads.points(Path("trace")), ids=lambda point: point.name)
def test_bench_serving_takes_it(
    point: workloads.Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.benchmark import serving

    taken: list[SimpleNamespace] = []
    monkeypatch.setattr(serving, "run_benchmark", taken.append)
    monkeypatch.setattr(workloads, "_write_requests", lambda path, *_: path.touch())
    arguments = point.arguments(Path("tokenizer"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_serving", *arguments])
    serving.cli_main()
    (args,) = taken
    assert args.max_concurrency == point.concurrency
    assert args.request_rate == (point.request_rate or float("inf"))
    expected = "custom" if point.rows else point.options["dataset-name"]
    assert args.dataset_name == expected
    assert point.rows is None or Path(args.dataset_path).exists()


def test_the_trace_is_read(tmp_path: Path) -> None:
    """SGLang's own benchmark would crash on it: its records are no requests."""
    from bench_serving import load_serving
    from sglang.benchmark.datasets.mooncake import MooncakeDataset

    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [0, 7]}\n' * 3)
    for _ in range(2):  # prepared once, however often it is asked for
        load_serving()
    records = MooncakeDataset(str(trace), "conversation", 2).load()
    assert [record["hash_ids"] for record in records] == [[0, 7]] * 2
    assert {(type(r).__mro__[1], r.prompt, r.prompt_len) for r in records} == {(dict, "", 0)}


def test_requests_are_made_once_and_arrive_alike(tmp_path: Path) -> None:
    import numpy as np
    from bench_serving import load_serving

    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [0, 7]}\n' * 3)
    args = SimpleNamespace(
        dataset_name="mooncake", dataset_path=str(trace), mooncake_workload="conversation",
        num_prompts=2, seed=3, base_url="", tokenize_prompt=False,
    )  # fmt: skip
    arrivals = []
    for args.base_url in ("http://a", "http://b"):
        requests = load_serving().get_dataset(args, None)
        arrivals.append(np.random.rand())
        assert requests == [{"timestamp": 0, "hash_ids": [0, 7]}] * 2
        requests[0]["hash_ids"].append(9)  # whatever a run does to them
        trace.write_text('{"timestamp": 0, "hash_ids": [5]}')
    assert arrivals[0] == arrivals[1]
    args.num_prompts = 1  # other requests than these
    assert [r["hash_ids"] for r in load_serving().get_dataset(args, None)] == [[5]]


def test_prompts_are_sent_as_token_ids(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that bench_serving would send as text, and made before the run that sends them."""
    import bench_serving
    from sglang.benchmark import serving

    point = workloads._shared_prefix("tiny", groups=2, samples=3, system=40, question=5, output=4)
    made = {}
    for ids in (False, True):
        monkeypatch.setenv("HOME", str(tmp_path / str(ids)))  # where SGLang keeps what it made
        bench_serving.make_requests(replace(point, ids=ids), model, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(serving, "run_benchmark", lambda args: made.update({
                args.tokenize_prompt: serving.get_dataset(args, None, None)
            }))  # fmt: skip
            arguments = replace(point, ids=ids).arguments(model, tmp_path)
            patch.setattr(sys, "argv", ["bench_serving", "--seed", "1", *arguments])
            serving.cli_main()
    tokenizer = serving.get_tokenizer(str(model))
    assert len(made[True]) == 6
    assert [tokenizer.encode(request.prompt) for request in made[False]] == [
        request.prompt for request in made[True]
    ]


def test_every_token_of_a_shape_prints(model: Path, tmp_path: Path) -> None:
    import shapes
    from transformers import AutoTokenizer

    folder = shapes.make("qwen3-8b", model, tmp_path / "shape")
    filled, plain = (AutoTokenizer.from_pretrained(path) for path in (folder, model))
    assert len(filled) == shapes.SHAPES["qwen3-8b"]["vocab_size"]
    text = "The sea is 12 miles <49152> wide; <60000> so they say."
    assert filled.encode(text) == plain.encode(text)
    ids = range(len(plain), len(filled), 97)
    assert all(filled.decode([token]).strip() for token in ids)
