"""Runs in the environment of a client, where lowbit is not imported; a line of JSON asks.

The answer is `answer.safetensors` in the folder `out`: `logits`, and `weights.<module>`, each layer
as the client decodes it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 64


def calibration(vocabulary: int) -> torch.Tensor:
    """Returns token ids [rows, length], the same for all."""
    size = (CALIBRATION_ROWS, CALIBRATION_LENGTH)
    return torch.randint(1, vocabulary, size, generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, asked: dict[str, Any]) -> torch.Tensor:
    # With gradients: without, bitsandbytes takes an approximate kernel.
    logits: torch.Tensor = model(input_ids=torch.tensor(asked["ids"])).logits
    return logits.detach()


def stock(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loads a checkpoint with transformers alone."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, asked.get("dtype", "float32"))
    options = {"gguf_file": asked["gguf_file"]} if "gguf_file" in asked else {}
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype, **options)
    answer = {"logits": logits_of(model, asked)}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            answer[f"weights.{name}"] = gptqmodel_weight(module)
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and weight is not None:
            answer[f"weights.{name}"] = decoded(weight)
    return answer


def decoded(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight of transformers as it is, or what bitsandbytes packed into it."""
    if type(weight).__name__ != "Params4bit":
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    made: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return made


def write_bnb(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantizes with bitsandbytes while loading, and saves."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked["kind"],
        bnb_4bit_use_double_quant=asked["nested"],
    )
    model = AutoModelForCausalLM.from_pretrained(asked["model"], quantization_config=config)
    model.save_pretrained(Path(asked["out"]) / "written")
    return stock({**asked, "model": str(Path(asked["out"]) / "written")})


def write_compressed(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantizes with llm-compressor, saves, and loads what it saved."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.bfloat16)
    inputs = asked.get("activations")
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**asked["weights"]),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    kind = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[asked["method"]]
    ids = calibration(model.config.vocab_size)
    rows = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    oneshot(
        model=model,
        dataset=rows,
        recipe=[kind(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    written = Path(asked["out"]) / "written"
    model.save_pretrained(written, save_compressed=True)
    return stock({**asked, "model": str(written), "dtype": "bfloat16"})


def gptqmodel_answer(folder: str, asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loads a checkpoint with GPTQModel; its plain kernel decodes and multiplies."""
    from gptqmodel import BACKEND, GPTQModel

    # Left alone it takes bf16 on a CPU, and rounds scales to that.
    options = {"device": "cpu", "dtype": torch.float16, "backend": BACKEND(asked["backend"])}
    loaded = GPTQModel.load(folder, **options)
    model = loaded.model
    answer = {"logits": logits_of(model, asked)}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            answer[f"weights.{name}"] = gptqmodel_weight(module)
    return answer


def gptqmodel_weight(module: Any) -> torch.Tensor:
    """Returns the weight of a layer of GPTQModel, [out_features, in_features]."""
    if hasattr(module, "dequantize_weight"):
        weight: torch.Tensor = module.dequantize_weight()
        return weight.detach().T
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    made: torch.Tensor = dequantize_gemm(
        module.qweight, module.qzeros, module.scales, module.bits, module.group_size
    )
    return made.detach().T


def load_gptqmodel(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loads a checkpoint of ours."""
    return gptqmodel_answer(asked["model"], asked)


def write_gptqmodel(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantizes with GPTQModel, saves, and loads what it saved."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(asked["model"], QuantizeConfig(device="cpu", **asked["config"]))
    ids = calibration(model.model.config.vocab_size)
    mask = [1] * ids.shape[1]
    rows = [{"input_ids": row, "attention_mask": mask} for row in ids.tolist()]
    model.quantize(rows, batch_size=4, backend=BACKEND(asked["backend"]))
    written = Path(asked["out"]) / "written"
    model.save(str(written))
    return gptqmodel_answer(str(written), asked)


def write_autoround(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantizes with AutoRound and saves in a format of others."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    ids = calibration(model.config.vocab_size)
    rows: Any = [{"input_ids": row} for row in ids]
    AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(asked["model"]),
        dataset=DataLoader(rows, batch_size=4),
        device_map="cpu",
        enable_torch_compile=False,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        iters=2,
        **asked["config"],
    ).quantize_and_save(str(Path(asked["out"]) / "written"), format=asked["format"])
    # Its fake-quantized model is what it means by the file.
    return {
        f"weights.{name}": module.weight.detach().clone()
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    } or {"nothing": torch.zeros(1)}


def answer(asked: dict[str, Any]) -> None:
    """Does what was asked for and writes the answer."""
    made = globals()[asked["do"]](asked)
    assert "lowbit" not in sys.modules
    tensors = {name: tensor.contiguous().clone() for name, tensor in made.items()}
    save_file(tensors, Path(asked["out"]) / "answer.safetensors")


def main() -> None:
    """Answers one request a line, until there are no more; imports take longer than requests."""
    saying = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        try:
            answer(json.loads(line))
            reply = ""
        except Exception:
            reply = traceback.format_exc()[-3000:]
        print(json.dumps(reply), file=saying, flush=True)


if __name__ == "__main__":
    main()
