"""What only a GPU can show: the reference's numbers, training in every precision and ZeRO stage, the engine's answers.

Without one every test is skipped. On a machine that has one: `DS_ACCELERATOR=cuda python -m pytest tests/gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cuts
import numpy as np
import pytest
import serve_toy
import torch
import torch.distributed as dist
from golden import case, facts, needs_golden

from af2_ray.audio.windows import to_windows
from af2_ray.config import DeepSpeedSettings, Lora, Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Request
from af2_ray.models.lora import add_lora, merge_lora
from af2_ray.text import format_prompt
from af2_ray.train.deepspeed import start_engine
from af2_ray.train.losses import afclap_loss_sum
from af2_ray.train.step import Step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 12


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 is fp32, not TF32; these switches are no attributes that monkeypatch could put back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


@needs_golden
@pytest.mark.parametrize("name", ["n1", "n2"])
@torch.no_grad()
def test_the_reference_s_numbers(name: str) -> None:
    """Features within 1e-3 (3.6e-4 on an H100), logits within 3e-3 (1.2e-3), equal greedy tokens."""
    golden = case(name)
    model = golden.model.to("cuda")
    try:
        io = {key: value.cuda() for key, value in golden.io.items()}
        waveforms, real = golden.waveforms.cuda(), io["attention_mask"].bool()
        features = model.audio_tower(waveforms).split(golden.counts)
        for clip, (part, count) in enumerate(zip(features, golden.counts, strict=True)):
            torch.testing.assert_close(part, io["clap"][clip, :count], atol=1e-3, rtol=0)
        heard: dict[str, Any] = {"waveforms": waveforms, "windows_per_clip": golden.counts}
        out = model(io["input_ids"], attention_mask=io["attention_mask"].long(), **heard)
        torch.testing.assert_close(out.logits[real], io["hf.logits"][real], atol=3e-3, rtol=0)
        for clip, windows in enumerate(waveforms.split(golden.counts)):
            ids = io["input_ids"][clip]
            prompt = ids[None, : int((ids == facts()["tokenizer"]["sep"]).nonzero()[0]) + 1]
            limits = {"max_new_tokens": facts()["args"]["gen_tokens"], "do_sample": False, "eos_token_id": None}
            new = model.generate(prompt, waveforms=windows, windows_per_clip=[len(windows)], **limits)
            wanted = io["hf.generated"][clip]
            assert new[0].tolist() == wanted[wanted >= 0].tolist()
    finally:
        model.to("cpu")  # it is shared by the tests of this process


def losses(**settings: Any) -> list[float]:
    """Losses of steps over the same two rows."""
    rows = cuts.my_rows((1, 4), 0, with_fault=False)[:2]
    model = cuts.make_model(torch.float32)
    deepspeed = DeepSpeedSettings(**settings)
    engine = start_engine(model, deepspeed, cuts.GENTLE.optimizer, num_steps=STEPS, accumulation=len(rows))
    step = Step(engine, cuts.GENTLE)
    return [step(rows)["loss"] for _ in range(STEPS)]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_zero_stages_train_alike(zero_stage: int) -> None:
    plain = losses(zero_stage=0, precision="fp32")
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(losses(zero_stage=zero_stage, precision="fp32"), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("mixed", 0), ("mixed", 2), ("auto", 1), ("auto", 2), ("auto", 3)]
)
@pytest.mark.usefixtures("process_group")
def test_products_in_bf16_train(precision: str, zero_stage: int) -> None:
    """`auto` is bf16 here."""
    found = losses(zero_stage=zero_stage, precision=precision)
    assert found[-1] < found[0]
    np.testing.assert_allclose(found, losses(zero_stage=0, precision="fp32"), rtol=0.05)


def test_afclap_s_loss_and_gradients_are_the_cpu_s() -> None:
    torch.manual_seed(0)
    found = []
    shapes = [(6, 16), (6, 3, 16), (6, 3, 3, 16)]
    vectors = [torch.nn.functional.normalize(torch.randn(shape), dim=-1) for shape in shapes]
    masks = [torch.rand(shape[:-1]) > 0.2 for shape in shapes[1:]]
    masks[0][:, 0] = True
    for device in ("cpu", "cuda"):
        inputs = [vector.detach().to(device).requires_grad_() for vector in vectors]
        scale = torch.tensor([14.0], device=device)
        loss = afclap_loss_sum(*inputs, *(mask.to(device) for mask in masks), scale)
        loss.backward()
        found.append([loss.detach().cpu(), *(vector.grad.cpu() for vector in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_answers_under_load_are_generate_s(tiny_tokenizer: Any) -> None:
    """Greedy, in fp32: six slots, forty requests about clips of unlike length, some of which come later.

    The last one goes on alone for so long that its recorded step is outgrown.
    """
    model = serve_toy.build(tiny_tokenizer).to("cuda").eval()
    engine = Engine(model, tiny_tokenizer, Serve(num_slots=6, max_new_tokens=160))
    random = np.random.default_rng(0)
    clips = [Clip.of(to_windows(random.uniform(-0.5, 0.5, 16_000 * seconds))) for seconds in (2, 7, 12, 31)]
    requests = []
    for number in range(40):
        heard = (clips[number % 4],) if number % 5 else ()
        length = 150 if number == 39 else 3 + number % 17
        words = f"{'word ' * (number % 9)}{number}?"
        requests.append(Request(words, heard, max_new_tokens=length, min_new_tokens=length if number % 3 == 0 else 0))
    answers: dict[int, Any] = {}
    for number, request in enumerate(requests):
        engine.submit(request, lambda event, number=number: answers.__setitem__(number, event))  # type: ignore[misc]
        if number % 3 == 0:
            engine.step()
    while engine.step():
        pass
    graphs = engine.graphs
    assert graphs is not None
    assert graphs.works
    assert graphs.num_replayed > graphs.num_launched + graphs.num_recorded
    for number, request in enumerate(requests):
        text = format_prompt(request.prompt, len(request.clips))
        ids = torch.tensor([tiny_tokenizer(text, add_special_tokens=False)["input_ids"]], device="cuda")
        audio: dict[str, Any] = {"min_new_tokens": request.min_new_tokens or None, "do_sample": False}
        for clip in request.clips:
            audio |= {"waveforms": torch.from_numpy(clip.windows).cuda(), "windows_per_clip": [clip.num_windows]}
        new = model.generate(ids, **audio, max_new_tokens=request.max_new_tokens)[0, ids.shape[1] :]
        assert isinstance(answers[number], Answer)
        assert answers[number].text == tiny_tokenizer.decode(new, skip_special_tokens=True), number


def test_loaded_by_itself_it_computes_in_bf16(tiny_tokenizer: Any, tmp_path: Any) -> None:
    engine = Engine.from_pretrained(str(serve_toy.export(tmp_path, tiny_tokenizer)), settings=Serve(num_slots=2))
    assert engine.model.dtype == torch.bfloat16
    assert engine.model.device.type == "cuda"
    clip = Clip.of(to_windows(np.random.default_rng(0).uniform(-0.5, 0.5, 16_000)))
    (answer,) = engine.answer([Request("a dog?", (clip,), max_new_tokens=8)])
    assert isinstance(answer, Answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_merge_to_the_same_bits_as_on_a_cpu(dtype: torch.dtype) -> None:
    """An export of a GPU is what `jobs/merge.py` makes of its part on any machine."""
    merged = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        lm = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(512, 768)})
        add_lora(lm, Lora(rank=16, alpha=24, targets=["q_proj"]))
        torch.nn.init.normal_(lm["q_proj"].lora_B["default"].weight)
        lm = lm.to(device, dtype)
        merge_lora(lm)
        merged.append(lm["q_proj"].weight.cpu())
    assert torch.equal(*merged)
