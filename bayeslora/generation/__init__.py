"""Text that a posterior writes: decoding under draws of the weights, and what the draws say of each text."""

from bayeslora.generation import answers, programs
from bayeslora.generation.answers import ANSWERS, exact_match
from bayeslora.generation.decoding import Decoding
from bayeslora.generation.texts import Generation
from bayeslora.generation.writing import METHODS, generate

__all__ = ["ANSWERS", "METHODS", "Decoding", "Generation", "answers", "exact_match", "generate", "programs"]
