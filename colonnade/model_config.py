"""The sizes of a decoder, under Hugging Face's names, and what a foreign config may not ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from colonnade.errors import UsageError

VOCAB_MULTIPLE = 128
"""The vocabulary is stored padded to a multiple of this, so that its shards do not depend on the rank count."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder, under the names of a Hugging Face `config.json` of the Llama family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            limit = {"int": 2**31, "float": math.inf, "bool": 2}[str(field.type)]
            if not value < limit:
                raise UsageError(f"model config: {field.name} is {value:.4g}; it must be below {limit}")
            if field.type != "bool" and not value > 0:
                raise UsageError(f"model config: {field.name} is {value}; it must be above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model config: {self.num_attention_heads} attention heads are not a multiple of "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UsageError(f"model config: head_dim {self.head_dim} is odd; rotary positions need an even one")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the stored embedding and head. Rows from `vocab_size` on are zero and stay zero."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, the vocabulary without padding."""
        return _count(outer_shapes(self)) + self.num_hidden_layers * _count(layer_shapes(self))

    @property
    def num_parameters_without_embeddings(self) -> int:
        """As `num_parameters`, without embedding and head."""
        return self.num_parameters - (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, vocab_size: int | None = None) -> ModelConfig:
        """A config from Hugging Face's keys (or a preset's).

        Args:
            values: the keys of a `config.json`; what does not shape the network is left aside.
            vocab_size: used where the keys name none (presets leave it to the tokenizer).

        Raises:
            UsageError: a size is missing or impossible, or the config asks for something this decoder lacks.
        """
        _refuse_unsupported(values)
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known and value is not None}
        rope = values.get("rope_parameters") or {}
        if rope.get("rope_theta") is not None:
            chosen["rope_theta"] = rope["rope_theta"]
        for key, value in chosen.items():
            kind = cls.__annotations__[key]
            # type(): True is an int to Python.
            if type(value) not in {"int": (int,), "float": (int, float), "bool": (bool,)}[kind]:
                raise UsageError(f"model config: {key} is {value!r:.80}; it must be of type {kind}")
        if vocab_size is not None:
            chosen.setdefault("vocab_size", vocab_size)
        heads = chosen.get("num_attention_heads")
        if heads:
            chosen.setdefault("num_key_value_heads", heads)
            if "hidden_size" in chosen and "head_dim" not in chosen:
                if chosen["hidden_size"] % heads:
                    raise UsageError(
                        f"model config: hidden_size {chosen['hidden_size']} is not a multiple of {heads} attention "
                        "heads; give head_dim"
                    )
                chosen["head_dim"] = chosen["hidden_size"] // heads
        required = {field.name for field in fields(cls)} - {"rms_norm_eps", "rope_theta", "attention_bias"}
        required -= {"mlp_bias", "tie_word_embeddings", "initializer_range"}
        missing = sorted(required - chosen.keys())
        if missing:
            raise UsageError(f"model config: {', '.join(missing)} missing")
        return cls(**chosen)

    @classmethod
    def from_json(cls, path: str | Path, *, vocab_size: int | None = None) -> ModelConfig:
        """A config from a Hugging Face `config.json`, or a folder that holds one. Raises `UsageError`."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--model-config {path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--model-config {path}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise UsageError(f"--model-config {path}: holds no JSON object")
        try:
            return cls.from_dict(values, vocab_size=vocab_size)
        except UsageError as error:
            raise UsageError(f"--model-config {path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer by their names in it, with their shapes: the one place that lists them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    projections = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key_value, hidden, config.attention_bias),
        "self_attn.v_proj": (key_value, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, has_bias) in projections.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    return {**shapes, "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters outside of layers, by name; the vocabulary without padding."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (config.hidden_size,),
    }
    return shapes if config.tie_word_embeddings else {**shapes, "lm_head.weight": table}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter by name, with its shape; the vocabulary without padding, a tied head left out."""
    layers = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    }
    return {**outer_shapes(config), **layers}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Name what a foreign config asks for and this decoder would silently get wrong."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise UsageError(f"model config: {key} is {values[key]!r:.80}; it must be a mapping")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expected = {
        "model_type": (values.get("model_type", "llama"), "llama"),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "rope type": (rope_type, "default"),
        "attention_dropout": (values.get("attention_dropout") or 0, 0),
    }
    for name, (value, supported) in expected.items():
        if value != supported:
            raise UsageError(f"model config: {name} {value!r} is not supported; only {supported!r} is")
