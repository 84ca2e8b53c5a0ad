"""What reaches our layer through PEFT and transformers, and what is refused on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraRuntimeConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from safetensors.torch import load_file
from test_adapters import IDS, logits, quantized, randomise, same, stored_bits
from transformers import AutoModelForCausalLM

from lowbit import LowbitError
from lowbit.adapters.layer import QuantLoraLinear
from lowbit.adapters.refusals import TRAINABLE_METHODS
from lowbit.nn.replace import restore_modules
from lowbit.nn.stored import StoredWeight


def run_python(code: str, autoload: bool) -> str:
    """Returns what `code` prints in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `base` (low bits), `llama-float` and `adapter`, and its logits."""
    folder = tmp_path_factory.mktemp("saved")
    model, _ = quantized(folder)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=3))
    randomise(peft_model)
    peft_model.save_pretrained(str(folder / "adapter"))
    torch.save(logits(peft_model), folder / "logits.pt")
    return folder


def test_without_any_import_of_ours(saved: Path) -> None:
    """torch's entry point is enough: for an adapter's folder, and for a new adapter."""
    code = (
        "import sys, torch, peft\n"
        "print('lowbit.adapters.layer' in sys.modules, 'lowbit.nn' in sys.modules)\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "count = lambda m: sum(type(p).__name__ == 'QuantLoraLinear' for p in m.modules())\n"
        f"m = A.from_pretrained({str(saved / 'adapter')!r})\n"
        f"w = torch.load({str(saved / 'logits.pt')!r})\n"
        "y = m(torch.arange(3, 27).view(2, 12), use_cache=False).logits\n"
        "print(count(m), torch.equal(y, w))\n"
        f"m = A.from_pretrained({str(saved / 'base')!r})\n"
        "print(count(peft.get_peft_model(m, peft.LoraConfig(target_modules='all-linear'))))"
    )
    assert run_python(code, True).split() == ["False", "False", "21", "True", "21"]


FAKE = """
import sys, types, importlib.abc, importlib.machinery
class Fake(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "peft":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def exec_module(self, module):
        if module.__name__ == "peft.tuners.tuners_utils":
            class BaseTuner:
                def inject_adapter(self): pass
                def _check_merge_allowed(self): pass
            module.BaseTuner = BaseTuner
        if module.__name__ == "peft.peft_model":
            class PeftModel:
                def save_pretrained(self): pass
            module.PeftModel = PeftModel
sys.meta_path.insert(0, Fake())
"""


@pytest.mark.parametrize("order", ["import lowbit, PEFT", "import PEFT, lowbit"])
def test_either_order_of_imports_wraps_pefts_tuners_once(order: str) -> None:
    """With a stand-in for PEFT, whose own import takes seconds."""
    code = (
        f"{FAKE}\n{order.replace('PEFT', 'peft.tuners.tuners_utils, peft.peft_model')}\n"
        "import lowbit.hf.autoload as autoload, peft.tuners.tuners_utils as module\n"
        "tuner = module.BaseTuner; first = tuner.inject_adapter\n"
        "autoload.install()\n"
        "print(hasattr(first, '__wrapped__'), first is tuner.inject_adapter)\n"
        "print(hasattr(peft.peft_model.PeftModel.save_pretrained, '__wrapped__'))\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code, False).split() == ["True", "True", "True", "False"]


def test_a_config_made_before_lowbit_is_registered_is_no_exception(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path)
    config = LoraConfig(target_modules=["q_proj"])
    config._custom_modules = None  # as it is where nobody told PEFT of us
    peft_model = get_peft_model(model, config)
    assert sum(isinstance(part, QuantLoraLinear) for part in peft_model.modules()) == 3


def test_our_adapter_loads_on_the_16_bit_model_without_lowbit(saved: Path) -> None:
    """Same A and B on W instead of Q: what differs is what quantization lost."""
    code = (
        "import sys; sys.modules['lowbit'] = None\n"
        "import torch, peft\nfrom transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(saved / 'llama-float')!r})\n"
        f"m = peft.PeftModel.from_pretrained(m, {str(saved / 'adapter')!r})\n"
        "print(sum(type(p).__name__ == 'Linear' and hasattr(p, 'lora_A') for p in m.modules()))\n"
        "y = m(torch.arange(3, 27).view(2, 12), use_cache=False).logits\n"
        f"torch.save(y.detach(), {str(saved / 'stock.pt')!r})"
    )
    assert run_python(code, False) == "21"
    stock = torch.load(saved / "stock.pt")
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    restore_modules(model, torch.float32)
    decoded = logits(PeftModel.from_pretrained(model, saved / "adapter"))
    torch.testing.assert_close(decoded, torch.load(saved / "logits.pt"), atol=2e-3, rtol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(saved / "llama-float")
    ours = logits(PeftModel.from_pretrained(plain, saved / "adapter"))
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-5)


def test_a_second_adapter_and_a_switch(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    plain = logits(model)
    model = PeftModel.from_pretrained(model, saved / "adapter", adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["q_proj"], use_dora=True))
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), plain, atol=1e-3, rtol=1e-3)
    model.set_adapter("one")
    wanted = torch.load(saved / "logits.pt")
    assert torch.equal(logits(model), wanted)
    model.eval()
    mixed = model(IDS, use_cache=False, adapter_names=["one", "__base__"]).logits
    torch.testing.assert_close(mixed[0], wanted[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, atol=2e-3, rtol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_siblings_still_multiply_together_under_adapters(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj._siblings is not None, "no native kernels here?"
    one = IDS[:, :1]
    wanted = model(one, use_cache=False).logits
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    group = attention.q_proj.base_layer._siblings[0]
    with torch.no_grad():
        for _ in range(5):
            y = peft_model(one, use_cache=False).logits
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    assert group.weight is not None, "the layers came apart"
    attention.q_proj.merge()
    with torch.no_grad():
        for _ in range(5):
            peft_model(one, use_cache=False)
    attention.q_proj.unmerge()
    assert group.weight is not None


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone(tmp_path: Path, init: Any) -> None:
    model, _ = quantized(tmp_path)
    before, plain = stored_bits(model), logits(model)
    options = {"eva_config": EvaConfig(rho=1.0)} if init == "eva" else {}
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=init, **options)
    peft_model = get_peft_model(model, config)
    if init == "eva":
        initialize_lora_eva_weights(peft_model, [{"input_ids": IDS}] * 3)
    assert same(stored_bits(peft_model), before)
    if init is not False:
        torch.testing.assert_close(logits(peft_model), plain, atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_residual"),
    "fast pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_residual"),
    "olora": ({"init_lora_weights": "olora"}, "init_residual"),
    "corda": ({"init_lora_weights": "corda"}, "init_residual"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_residual"),
    "loftq": ({}, "init_residual"),
    "mica": ({"init_lora_weights": "mica"}, "init_residual"),
    "kasa": ({"kasa_config": {}}, "kasa_config is not supported"),
    "rank": ({"r": 65}, r"rank 65 is larger than the layer \(64 x 64\); use at most 64"),
    "rank of one layer": ({"rank_pattern": {"q_proj": 99}}, "rank 99"),
    "dora and zero points": ({"use_dora": True, "use_qalora": True}, "exclude each other"),
    "zero points": ({"use_qalora": True}, "quantize the base as W4A16_ASYM_G64"),
    "a quantized parameter": (
        {"target_parameters": ["q_proj.weight"]},
        "name 'q_proj' in target_modules",
    ),
    "no such parameter": ({"target_parameters": ["experts.gate"]}, "no parameter 'experts.gate'"),
    "copies": ({"modules_to_save": ["o_proj"]}, "o_proj is quantized"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_write_or_lose_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    options, sentence = REFUSED[what]
    model, _ = quantized(tmp_path)
    before = stored_bits(model)
    if what == "loftq":  # which wants SciPy before it is known where it goes
        config = LoraConfig(target_modules=["q_proj"])
        config.init_lora_weights = "loftq"
    else:
        config = LoraConfig(**{"target_modules": ["q_proj"], **options})
    with pytest.raises(LowbitError, match=sentence) as error:
        get_peft_model(model, config)
    assert "\n" not in str(error.value)
    assert same(stored_bits(model), before)


def test_a_quantized_embedding_takes_no_adapter(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, quantize_embeddings=True)
    for options in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ):
        with pytest.raises(LowbitError, match="is quantized"):
            get_peft_model(model, LoraConfig(**options))


METHODS: dict[str, Any] = {
    "ADALORA": AdaLoraConfig(total_step=10),
    "IA3": IA3Config(feedforward_modules=[]),
    "LOHA": LoHaConfig(),
    "LOKR": LoKrConfig(),
    "VERA": VeraConfig(),
    "OFT": OFTConfig(oft_block_size=8, use_cayley_neumann=False),
    "HRA": HRAConfig(),
    "FOURIERFT": FourierFTConfig(n_frequency=20),
    "VBLORA": VBLoRAConfig(num_vectors=16, vector_length=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_compute_as_on_the_decoded_model_and_do_not_merge(
    tmp_path: Path, method: str
) -> None:
    assert method in TRAINABLE_METHODS
    results = []
    for decoded in (True, False):
        model, _ = quantized(tmp_path)
        if decoded:
            restore_modules(model, torch.float32)
        config = METHODS[method]
        config.target_modules = {"q_proj", "v_proj"}
        torch.manual_seed(5)
        peft_model = get_peft_model(model, config).train()
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        loss = peft_model(IDS, labels=IDS).loss
        loss.backward()
        gradients = [p.grad for p in peft_model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    (wanted, others), (ours, gradients) = results
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=2e-2)
    before = stored_bits(peft_model)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises((LowbitError, AttributeError), match=r"thrown away|has no attribute"):
            merge()
    assert same(stored_bits(peft_model), before)


@pytest.mark.parametrize("config", [OSFConfig(), MissConfig()], ids=lambda c: str(c.peft_type))
def test_methods_that_nobody_tried_are_refused(tmp_path: Path, config: Any) -> None:
    model, _ = quantized(tmp_path)
    config.target_modules = {"q_proj"}
    with pytest.raises(LowbitError, match="is not known to leave low-bit layers as they are"):
        get_peft_model(model, config)
    restore_modules(model, torch.float32)
    get_peft_model(model, config)


def test_a_config_that_was_saved_is_like_the_first(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["q_proj"],
        use_dora=True,
        runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=False),
    )
    config.save_pretrained(tmp_path / "config")
    model, _ = quantized(tmp_path)
    peft_model = get_peft_model(model, LoraConfig.from_pretrained(tmp_path / "config"))
    assert sum(isinstance(part, QuantLoraLinear) for part in peft_model.modules()) == 3


@pytest.mark.parametrize("route", ["get_peft_model", "add_adapter"])
def test_saving_an_adapter_does_not_unpack_the_base(
    tmp_path: Path, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = quantized(tmp_path)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"])
    if route == "add_adapter":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    whole = set(model.state_dict())
    assert any(name.endswith("weight_packed") for name in whole)

    def unpack(_: Any) -> None:
        raise AssertionError("the base was brought into its stored form")

    with monkeypatch.context() as patched:
        patched.setattr(StoredWeight, "quantized_weight", property(unpack))
        model.save_pretrained(str(tmp_path / "adapter"))
    assert set(model.state_dict()) == whole
    saved_names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert len(saved_names) == 7
    assert all("lora_" in name or name.endswith("norm.weight") for name in saved_names)
