"""The evaluation harness (lm-eval): a posterior as one of its models."""

from bayeslora.errors import SettingError

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as error:
    raise SettingError("The evaluation harness is not installed: pip install 'bayeslora[harness]'.") from error

from bayeslora.harness.model import AVERAGES, PosteriorLM
from bayeslora.harness.running import evaluate, tables, write

__all__ = ["AVERAGES", "PosteriorLM", "evaluate", "tables", "write"]
