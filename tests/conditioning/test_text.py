"""Laws of the closed-vocabulary text encoder: nothing a person types is dropped without a word."""

import pytest
import torch

from vidgen.conditioning.text import FILLER, PADDING, SYNONYMS, Vocabulary, WordEncoder, WordEncoderConfig
from vidgen.world import WORLDS, parse_caption

CONTENT_WORDS = WORLDS["full"].words
WORDS = Vocabulary(CONTENT_WORDS)
MAX_WORDS = 16


def ids(prompt: str) -> tuple[int, ...]:
    return WORDS.tokenize(prompt, MAX_WORDS).ids


@pytest.fixture(scope="module")
def encoder() -> WordEncoder:
    torch.manual_seed(0)
    config = WordEncoderConfig(
        content_words=CONTENT_WORDS, width=16, num_layers=1, num_heads=2, max_words=MAX_WORDS
    )
    return WordEncoder(config).eval().requires_grad_(False)


def test_known_words_become_their_numbers_padded_to_the_end():
    tokens = WORDS.tokenize("a red circle", MAX_WORDS)
    assert tokens.ids == (WORDS.number["a"], WORDS.number["red"], WORDS.number["circle"], *[PADDING] * 13)
    assert tokens.unknown == {}


def test_every_word_has_a_number_of_its_own_and_none_is_the_paddings():
    numbers = list(WORDS.number.values())
    assert len(numbers) == len(set(numbers)) == len(FILLER) + len(CONTENT_WORDS)
    assert PADDING not in numbers
    assert max(numbers) < len(WORDS)
    assert WORDS.content_words == CONTENT_WORDS


def test_every_caption_of_the_world_is_known_word_for_word():
    scenes = WORLDS["full"].scenes()
    captions = [scene.caption() for scene in scenes]
    for scene, caption in zip(scenes, captions, strict=True):
        assert WORDS.tokenize(caption, MAX_WORDS).unknown == {}
        assert parse_caption(caption) == scene
    assert len(set(map(ids, captions))) == len(scenes)


@pytest.mark.parametrize(("synonym", "word"), SYNONYMS.items())
def test_a_synonym_is_its_word(synonym: str, word: str):
    assert word in WORDS.number
    assert ids(f"red {synonym}") == ids(f"red {word}")


@pytest.mark.parametrize("prompt", ["A RED Circle", " a,red;circle. ", "a\tred\ncircle!", "a red-circle"])
def test_case_and_punctuation_do_not_matter(prompt: str):
    assert ids(prompt) == ids("a red circle")


def test_order_matters():
    assert ids("red circle") != ids("circle red")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("redd", "red"), ("circel", "circle"), ("squares", "square"), ("blak", "black"), ("grays", "gray")],
)
def test_unknown_words_are_reported_with_the_nearest_known_ones(typed: str, near: str):
    tokens = WORDS.tokenize(f"a green {typed} moving left", MAX_WORDS)
    assert list(tokens.unknown) == [typed]
    assert tokens.unknown[typed][0] == near
    assert tokens.ids == ids("a green moving left")


def test_a_word_near_to_nothing_is_reported_with_no_suggestion():
    assert WORDS.tokenize("red zzxqv", MAX_WORDS).unknown == {"zzxqv": []}


@pytest.mark.parametrize(
    "prompt", ["elephant", "a the over", "ein roter Kreis", "красный круг", "moving staying"]
)
def test_a_prompt_without_a_content_word_is_an_error_that_lists_the_vocabulary(prompt: str):
    with pytest.raises(ValueError) as caught:
        WORDS.tokenize(prompt, MAX_WORDS)
    assert repr(prompt) in str(caught.value)
    assert all(word in str(caught.value) for word in CONTENT_WORDS)


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_the_empty_prompt_is_all_padding(prompt: str):
    tokens = WORDS.tokenize(prompt, MAX_WORDS)
    assert tokens.ids == (PADDING,) * MAX_WORDS
    assert tokens.unknown == {}


def test_too_many_known_words_are_an_error_and_unknown_ones_do_not_count():
    assert len(ids("red " * MAX_WORDS)) == MAX_WORDS
    assert len(WORDS.tokenize("red " * MAX_WORDS + "elephant " * 9, MAX_WORDS).ids) == MAX_WORDS
    with pytest.raises(ValueError, match=f"{MAX_WORDS + 1} known words: at most {MAX_WORDS}"):
        WORDS.tokenize("red " * (MAX_WORDS + 1), MAX_WORDS)


def test_encoder_gives_one_embedding_a_word_and_does_not_mix_prompts(encoder: WordEncoder):
    prompts = ["a red circle", "a blue square moving left", ""]
    together = encoder(encoder.ids(prompts))
    assert together.shape == (3, MAX_WORDS, 16)
    for index, prompt in enumerate(prompts):
        torch.testing.assert_close(encoder(encoder.ids([prompt]))[0], together[index], rtol=1e-5, atol=1e-6)


def test_encoder_tells_prompts_and_orders_apart(encoder: WordEncoder):
    prompts = ["red circle", "blue circle", "red square", "circle red", ""]
    embedded = encoder(encoder.ids(prompts)).flatten(1)
    assert (torch.cdist(embedded, embedded) + 10 * torch.eye(len(prompts))).min() > 0.1


@pytest.mark.parametrize("prompt", ["!!!", "🔴", "..."])
def test_a_prompt_of_signs_only_is_an_error(prompt: str):
    with pytest.raises(ValueError, match="no word"):
        WORDS.tokenize(prompt, MAX_WORDS)
