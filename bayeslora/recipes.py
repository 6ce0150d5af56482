"""Ways to fine-tune, each by one word: the configuration that PEFT gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from bayeslora.errors import SettingError, unknown
from bayeslora.settings import Count, Settings, build

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["RECIPES", "LoraSettings", "Recipe", "recipe"]


@dataclass(frozen=True)
class LoraSettings(Settings):
    """What is trained of the network; settings that a method has no use for stay as they are.

    Attributes:
        method: one of `RECIPES`.
        r: rank.
        alpha: scale of the update, which is alpha / r times B A x (alpha / sqrt(r) for "rslora").
        dropout: probability of dropping an input of a LoRA layer in training.
        target_modules: names of the layers that get one, a regular expression of names, or "all-linear".
        tokens: of a prompt, or of a prefix in each layer.
    """

    name: ClassVar[str] = "lora"

    r: Count = 8
    alpha: Count = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    method: str = "lora"
    tokens: Count = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in RECIPES:
            raise SettingError(unknown("way to fine-tune", self.method, RECIPES))
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name not in ("method", *RECIPES[self.method].settings):
                raise SettingError(
                    f"'{self.method}' has no {field.name}, found lora.{field.name}={getattr(self, field.name)}: leave "
                    "it out."
                )

    def to_peft(self) -> PeftConfig | None:
        """PEFT's configuration; None where the whole network is trained."""
        return RECIPES[self.method].make(self)

    @property
    def targets(self) -> str | list[str]:
        """The layers, as PEFT takes them."""
        found = self.target_modules
        if isinstance(found, tuple):
            return list(found)
        # PEFT would match a word with the full name of a layer, not with its end.
        word = found != "all-linear" and found.replace("_", "").isalnum()
        return [found] if word else found


def recipe(lora: PeftConfig | LoraSettings | Mapping[str, Any] | str | None) -> PeftConfig | LoraSettings:
    """What a name, or a mapping as YAML has it, is short for; a configuration as it is.

    Raises:
        SettingError: nothing goes by this name, or a setting is wrong.
    """
    from peft import PeftConfig

    if isinstance(lora, PeftConfig | LoraSettings):
        return lora
    if isinstance(lora, str):
        return LoraSettings(method=lora)
    if lora is None or isinstance(lora, Mapping):
        return build(LoraSettings, lora or {})
    raise SettingError(
        f"lora is {lora!r}, expected a name such as 'dora', settings such as {{'r': 4}}, or a PeftConfig."
    )


class Recipe(NamedTuple):
    """A way to fine-tune.

    Attributes:
        what: what it trains, in a line.
        paper: source of the method.
        settings: names of those of `LoraSettings` that it has.
        make: gives PEFT's configuration for the settings.
    """

    what: str
    paper: str
    settings: tuple[str, ...]
    make: Callable[[LoraSettings], PeftConfig | None]


def _lora(settings: LoraSettings, **more: Any) -> PeftConfig:
    from peft import LoraConfig

    matrices = {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "target_modules": settings.targets}
    return LoraConfig(r=settings.r, **matrices, **more)


def _adalora(settings: LoraSettings) -> PeftConfig:
    from peft import AdaLoraConfig

    # Ranks are allocated by the backend of that name, not by PEFT, which asks for a number of steps all the same.
    matrices = {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "target_modules": settings.targets}
    return AdaLoraConfig(init_r=settings.r, target_r=settings.r, total_step=1_000_000, **matrices)


def _ia3(settings: LoraSettings) -> PeftConfig:
    from peft import IA3Config

    return IA3Config()


def _prompt(settings: LoraSettings, config: str) -> PeftConfig:
    import peft

    found: PeftConfig = getattr(peft, config)(num_virtual_tokens=settings.tokens)
    return found


_MATRICES = ("r", "alpha", "dropout", "target_modules")

#: By name.
RECIPES: dict[str, Recipe] = {
    "lora": Recipe("matrices B A beside linear layers and embeddings", "Hu et al., ICLR 2022", _MATRICES, _lora),
    "rslora": Recipe(
        "LoRA, its scale by the root of the rank",
        "Kalajdzievski, arXiv 2312.03732",
        _MATRICES,
        partial(_lora, use_rslora=True),
    ),
    "pissa": Recipe(
        "LoRA that begins at the largest singular values of each weight, of which the rest is frozen",
        "Meng et al., NeurIPS 2024",
        _MATRICES,
        partial(_lora, init_lora_weights="pissa"),
    ),
    "dora": Recipe(
        "LoRA of directions, and the size of each output",
        "Liu et al., ICML 2024",
        _MATRICES,
        partial(_lora, use_dora=True),
    ),
    "adalora": Recipe(
        "matrices P diag(e) Q; the backend 'adalora' allocates their ranks and holds P and Q orthogonal, others do not",
        "Zhang et al., ICLR 2023",
        _MATRICES,
        _adalora,
    ),
    "ia3": Recipe("a factor for each key, value and inner unit", "Liu et al., NeurIPS 2022", (), _ia3),
    "prompt-tuning": Recipe(
        "tokens before the text",
        "Lester et al., EMNLP 2021",
        ("tokens",),
        partial(_prompt, config="PromptTuningConfig"),
    ),
    "p-tuning": Recipe(
        "the same, by a network that gives the tokens",
        "Liu et al., arXiv 2103.10385",
        ("tokens",),
        partial(_prompt, config="PromptEncoderConfig"),
    ),
    "prefix-tuning": Recipe(
        "keys and values before those of the text, in each layer",
        "Li and Liang, ACL 2021",
        ("tokens",),
        partial(_prompt, config="PrefixTuningConfig"),
    ),
    "full": Recipe("all of the network, without PEFT", "", (), lambda settings: None),
}
