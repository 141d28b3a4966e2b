"""The configuration of a GPT-2 model, with the field names of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace

from tinygrad2.checkpoint import JsonObject


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and dropout rates of a GPT-2 model. The defaults are those of the published 124M model.

    bos_token_id and eos_token_id are the ids that begin and end a text, or None if unknown. Two configs are equal if
    their models compute the same function, even if these ids differ.
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: the maximum number of tokens in a sequence
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"  # GELU's tanh form; "gelu" is the exact form
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = field(default=None, compare=False)
    eos_token_id: int | tuple[int, ...] | None = field(default=None, compare=False)  # any of them ends a text
    # The contents of generation_config.json, whose ids take precedence; None if it contains only the ids above.
    generation_config: JsonObject | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"config: {name} is {value!r}; expected a positive integer")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"config: {name} is {value!r}; expected 0 <= rate < 1")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
                raise ValueError(f"config: {name} is {value!r}; expected a positive number")
        if self.n_embd % self.n_head:
            raise ValueError(f"config: n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"config: activation_function is {self.activation_function!r}; expected "
                + " or ".join(repr(name) for name in ACTIVATIONS)
            )

        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            listed = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if value is not None and not all(type(i) is int for i in listed):
                raise ValueError(f"config: {name} is {value!r}; expected an id or null (eos_token_id: or a list)")

    @staticmethod
    def preset(name: str) -> GPT2Config:
        """One of PRESETS. Raises ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @staticmethod
    def from_dict(values: JsonObject) -> GPT2Config:
        """The config in a Hugging Face config.json. Raises ValueError for an unsupported setting."""
        for name, supported in SUPPORTED_VALUES.items():
            if values.get(name, supported[0]) not in supported:
                raise ValueError(
                    f"config: {name} is {values[name]!r}, which is not supported; expected {supported[0]!r}"
                )
        inner = values.get("n_inner")
        if inner is not None and inner != 4 * values.get("n_embd", GPT2Config.n_embd):
            raise ValueError(f"config: n_inner is {inner}, which is not supported; expected 4 * n_embd")
        names = {f.name for f in fields(GPT2Config)} - {"generation_config"}  # it is stored in another file
        given = {name: value for name, value in values.items() if name in names}
        if isinstance(given.get("eos_token_id"), list):
            given["eos_token_id"] = tuple(given["eos_token_id"])
        return GPT2Config(**given)

    def to_dict(self) -> JsonObject:
        """The contents of config.json: these fields, and others that the loader of transformers requires."""
        constant = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
        sizes = {name: value for name, value in asdict(self).items() if name not in ("generation_config", *self.ids())}
        return {**constant, **self.ids(), "n_ctx": self.n_positions, **sizes}

    def ids(self) -> JsonObject:
        """The settings bos_token_id and eos_token_id, as in JSON."""
        ends = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return {"bos_token_id": self.bos_token_id, "eos_token_id": ends}

    @property
    def begin_id(self) -> int | None:
        """The id that begins a text, from generation_config.json or else from config.json; None if unknown."""
        found = self._given_ids("bos_token_id")
        return found[0] if found else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text, from generation_config.json or else from config.json."""
        return self._given_ids("eos_token_id")

    def _given_ids(self, name: str) -> tuple[int, ...]:
        for value in ((self.generation_config or {}).get(name), getattr(self, name)):
            listed = value if isinstance(value, list | tuple) else [value]
            found = tuple(i for i in listed if type(i) is int and 0 <= i < self.vocab_size)
            if found:
                return found
        return ()

    def with_ids(self, begin: int | None, ends: tuple[int, ...]) -> GPT2Config:
        """The config in which unknown ids are replaced by these."""
        changes: JsonObject = {}
        if self.begin_id is None and self.bos_token_id is None and begin is not None:
            changes["bos_token_id"] = begin
        if not self.end_ids and self.eos_token_id is None and ends:
            changes["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return replace(self, **changes) if changes else self

    @property
    def head_size(self) -> int:
        """D, the size of a head's query, key or value vector."""
        return self.n_embd // self.n_head

    def summary(self) -> str:
        """The sizes as text, such as "4 layers, 4 heads, embedding size 128, context 64"."""
        layers = f"{self.n_layer} layer{'s' * (self.n_layer != 1)}"
        heads = f"{self.n_head} head{'s' * (self.n_head != 1)}"
        return f"{layers}, {heads}, embedding size {self.n_embd}, context {self.n_positions}"

    @property
    def n_parameters(self) -> int:
        """The number of elements of all parameters; the output layer shares the token embedding."""
        C = self.n_embd
        block = 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
        return self.vocab_size * C + self.n_positions * C + self.n_layer * block + 2 * C

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every parameter, in the model's order.

        This is an iterator because a damaged file may declare so many layers that a list of names would not fit in
        memory.
        """
        C = self.n_embd
        yield from (("wte.weight", (self.vocab_size, C)), ("wpe.weight", (self.n_positions, C)))
        for layer in range(self.n_layer):
            yield from ((f"h.{layer}.ln_1.weight", (C,)), (f"h.{layer}.ln_1.bias", (C,)))
            yield from ((f"h.{layer}.attn.c_attn.weight", (C, 3 * C)), (f"h.{layer}.attn.c_attn.bias", (3 * C,)))
            yield from ((f"h.{layer}.attn.c_proj.weight", (C, C)), (f"h.{layer}.attn.c_proj.bias", (C,)))
            yield from ((f"h.{layer}.ln_2.weight", (C,)), (f"h.{layer}.ln_2.bias", (C,)))
            yield from ((f"h.{layer}.mlp.c_fc.weight", (C, 4 * C)), (f"h.{layer}.mlp.c_fc.bias", (4 * C,)))
            yield from ((f"h.{layer}.mlp.c_proj.weight", (4 * C, C)), (f"h.{layer}.mlp.c_proj.bias", (C,)))
        yield from (("ln_f.weight", (C,)), ("ln_f.bias", (C,)))

    def memory_to_generate(self, samples: int, prompt: int, more: int, itemsize: int = 4) -> dict[str, int]:
        """Bytes of memory, by purpose, to generate up to `more` tokens per sample after a prompt. Weights and temporary
        arrays are not included.

        itemsize  bytes per element of the activations.

        All tokens of the prompt are processed together, and so is half of the context when the text exceeds the
        context. Only one layer's activations exist at a time (16 arrays of width C; see memory_model.py).
        """
        context = self.n_positions
        at_once = min(prompt, context) if prompt + more <= context else max(min(prompt, context), context // 2)
        return {
            "keys and values": 2 * self.n_layer * samples * min(prompt + more, context) * self.n_embd * itemsize,
            "activations": (16 + 3) * samples * at_once * self.n_embd * itemsize,
            # The logits, their float32 copy, and the mask of isfinite.
            "logits": samples * self.vocab_size * (itemsize + 4 + 1),
        }

    def flops_per_token(self, block_size: int) -> int:
        """Floating-point operations per token in training: 6 per weight, plus causal attention.

        The forward pass takes 2 per weight, and 2 T C per layer in attention (q k^T and P V over T / 2 keys on
        average). The backward pass takes twice as many. The position embedding is not counted, since it is only looked
        up. The token embedding is counted, since it is also the matrix of the output layer.
        """
        weights = self.n_parameters - self.n_positions * self.n_embd
        return 6 * weights + 6 * self.n_layer * self.n_embd * block_size


def is_matrix(name: str) -> bool:
    """Whether a parameter is the weight matrix of a linear layer.

    Its shape is (in, out) here and in OpenAI's files, but (out, in) in PyTorch's nn.Linear, and therefore in files of
    nanoGPT, build-nanogpt and llm.c.
    """
    return ".c_" in name and name.endswith(".weight")


GPT2_VOCAB_SIZE = 50257  # tiktoken's gpt2
PADDED_VOCAB_SIZE = 50304  # as padded by nanoGPT and build-nanogpt; the additional ids never occur in text

WEIGHT_DTYPES = ("float32", "bfloat16")  # for generation; see model.generation_precision
RECOMPUTE = ("none", "block")  # what a training step recomputes in its backward pass, to save memory

ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh")  # the last is another name for the first

BYTE_PRESETS = ("nano", "micro")  # a new model of these sizes uses the vocabulary of its data

# Settings of Hugging Face's GPT2Config that change what the model computes, and the values that are supported here.
SUPPORTED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}

# Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2. The first two are not in the
# paper: they are small enough to train on a CPU, and their tokens are bytes. micro is the model in checkpoint/.
BYTES: JsonObject = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
PUBLISHED: JsonObject = {"vocab_size": GPT2_VOCAB_SIZE, "bos_token_id": 50256, "eos_token_id": 50256}
PRESETS = {
    "nano": GPT2Config(
        n_positions=64, n_embd=128, n_layer=4, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, **BYTES
    ),
    "micro": GPT2Config(
        n_positions=256, n_embd=192, n_layer=6, n_head=6, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, **BYTES
    ),
    "gpt2": GPT2Config(**PUBLISHED),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16, **PUBLISHED),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20, **PUBLISHED),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25, **PUBLISHED),
}
