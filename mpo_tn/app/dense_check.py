"""Two models that should compute the same, run on one sample: how far their outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mpo_tn.app.fidelity import sample_sentences
from mpo_tn.exceptions import MPOError
from mpo_tn.torch.hf.folder import load_tokenizer
from mpo_tn.torch.models.evaluating import evaluating

_SENTENCES = 4
_MOST_TOKENS = 64


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are apart, over all tensors of numbers that they give.

    ``relative`` is the norm of the difference over that of the outputs, ``largest`` the largest single difference;
    ``sample`` says what the models were run on.
    """

    relative: float
    largest: float
    sample: str

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)

    def sentence(self) -> str:
        """For people."""
        if self.largest == 0:
            return f"Both models give the same on {self.sample}, bit for bit."
        return (
            f"On {self.sample} the outputs of both models differ by {self.relative:.2g} of their norm; the largest "
            f"difference is {self.largest:.2g}."
        )


@dataclass(frozen=True)
class Sample:
    """What a model is called with, and what it is in words."""

    inputs: Mapping[str, torch.Tensor]
    words: str


def sample_inputs(model: Any, source: str) -> Sample:
    """Sentences, if ``source`` has a tokenizer, or ids that are drawn; and drawn pixels for a model that looks at some.

    Raises:
        MPOError: a model that takes neither ids nor pixels.
    """
    generator = torch.Generator().manual_seed(0)
    takes = {model.main_input_name}
    vision = getattr(model.config, "vision_config", model.config)
    if hasattr(vision, "image_size") and hasattr(model, "vision_model"):
        takes |= {"input_ids", "pixel_values"}
    unknown = sorted(takes - {"input_ids", "pixel_values"})
    if unknown:
        raise MPOError(
            f"a {type(model).__name__} takes {', '.join(unknown)}, of which no sample is known: leave out --check"
        )
    inputs: dict[str, torch.Tensor] = {}
    words: list[str] = []
    if "input_ids" in takes:
        inputs, text = _text(model, source, generator)
        words.append(text)
    if "pixel_values" in takes:
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        count = len(inputs.get("input_ids", range(2)))
        shape = (count, getattr(vision, "num_channels", 3), int(height), int(width))
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(model.dtype)
        words.append(f"{count} drawn pictures")
    if getattr(model.config, "is_encoder_decoder", False):
        decoder = model.config.get_text_config(decoder=True)
        ids = torch.randint(0, decoder.vocab_size, (len(next(iter(inputs.values()))), 8), generator=generator)
        inputs["decoder_input_ids"] = ids
    return Sample(inputs, " and ".join(words))


def _text(model: Any, source: str, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], str]:
    try:
        tokenizer = load_tokenizer(source)
        encoded = [
            tokenizer(text, truncation=True, max_length=_MOST_TOKENS)["input_ids"]
            for text in sample_sentences(_SENTENCES)
        ]
        shortest = min(len(ids) for ids in encoded)  # so that nothing has to be padded
        ids = torch.tensor([ids[:shortest] for ids in encoded])
        is_read = len(ids.unique()) > _SENTENCES  # otherwise most words are unknown to it
        if is_read and int(ids.max()) < model.config.get_text_config().vocab_size:
            return {"input_ids": ids}, f"{_SENTENCES} sentences of {shortest} tokens"
    except MPOError:
        pass
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (_SENTENCES, 16), generator=generator)
    return {"input_ids": ids}, f"{_SENTENCES} rows of 16 drawn ids (there is no tokenizer that fits)"


def output_difference(model: Any, reference: Any, sample: Sample) -> Difference:
    """How far the outputs of a model are from those of a reference.

    Raises:
        MPOError: outputs of other shapes, or that are not finite.
    """
    found: list[list[torch.Tensor]] = []
    for each in (model, reference):
        with evaluating(each), torch.no_grad():
            found.append([tensor.double() for tensor in _tensors(each(**sample.inputs))])
    if [tensor.shape for tensor in found[0]] != [tensor.shape for tensor in found[1]] or not found[0]:
        raise MPOError(
            f"the outputs of both models have not the same shapes on {sample.words}: the dense folder is damaged"
        )
    differences = [(a - b).abs() for a, b in zip(*found, strict=True)]
    largest = max(float(difference.max()) for difference in differences if difference.numel())
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in found[1]))
    if not math.isfinite(largest):
        raise MPOError(f"the outputs are not finite on {sample.words}: the model overflows in {reference.dtype}")
    return Difference(
        math.sqrt(sum(float(d.square().sum()) for d in differences)) / norm if norm else largest, largest, sample.words
    )


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor of numbers in what a model gives, caches apart."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
