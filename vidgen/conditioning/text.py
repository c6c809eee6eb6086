"""The closed-vocabulary text encoder of the built-in model: words in, embeddings out."""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# B batch, N words (padded), T text width

FILLER = ("a", "an", "the", "over", "on", "with", "background", "moving", "staying", "in", "of", "and")
SYNONYMS = {
    "grey": "gray",
    "violet": "purple",
    "disc": "circle",
    "disk": "circle",
    "ball": "circle",
    "box": "square",
    "static": "still",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "leftward": "left",
    "leftwards": "left",
    "rightward": "right",
    "rightwards": "right",
    "stripes": "striped",
    "checked": "checkered",
    "bounces": "bouncing",
    "moves": "moving",
}
PADDING = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Word numbers of a prompt, and the words that the vocabulary lacks with their nearest known ones."""

    ids: tuple[int, ...]
    unknown: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class WordEncoderConfig:
    content_words: tuple[str, ...]
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_words: int = 16


class Vocabulary:
    """The words a model was trained on; `content_words` are those that mean something."""

    def __init__(self, content_words: tuple[str, ...]) -> None:
        self.content_words = content_words
        self.number = {word: i + 1 for i, word in enumerate((*FILLER, *content_words))}

    def __len__(self) -> int:
        return len(self.number) + 1

    def tokenize(self, prompt: str, max_words: int) -> Tokens:
        """Word numbers, padded. ValueError when no content word is known or there are too many words.

        The empty prompt is the unconditional one: all padding.
        """
        words = [SYNONYMS.get(word, word) for word in _words(prompt)]
        known = [word for word in words if word in self.number]
        if prompt.strip() and not any(word in self.content_words for word in known):
            raise ValueError(
                f"prompt {prompt!r} has no word this model knows; it knows: {', '.join(self.content_words)}"
            )
        if len(known) > max_words:
            raise ValueError(f"prompt of {len(known)} known words: at most {max_words} fit; shorten it")
        candidates = (*self.number, *SYNONYMS)
        unknown = {
            word: difflib.get_close_matches(word, candidates, n=3, cutoff=0.5)
            for word in words
            if word not in self.number
        }
        ids = [self.number[word] for word in known]
        return Tokens(ids=tuple(ids + [PADDING] * (max_words - len(ids))), unknown=unknown)


class WordEncoder(nn.Module):
    """Word numbers [B, N] to embeddings [B, N, T] by a small transformer, trained with the DiT."""

    def __init__(self, config: WordEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.content_words)
        self.words = nn.Embedding(len(self.vocabulary), config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.max_words, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.num_heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids_BN: Tensor) -> Tensor:
        return self.norm(self.layers(self.words(ids_BN) + self.places))

    def tokenize(self, prompt: str) -> Tokens:
        """See Vocabulary.tokenize."""
        return self.vocabulary.tokenize(prompt, self.config.max_words)

    def ids(self, prompts: list[str]) -> Tensor:
        """Word numbers [B, N] of the prompts."""
        return torch.tensor([self.tokenize(prompt).ids for prompt in prompts])


def _words(prompt: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
