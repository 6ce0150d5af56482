"""The words of the demo's reviews and what each one is worth.

A value is a contribution to a review's hidden score: positive speaks for coming back, negative against.
The same word may be worth different things of different subjects: a cold beer is good, a cold soup is not.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ADVERBS",
    "CLOSERS",
    "COMPANIONS",
    "DOMAINS",
    "EXTREME_ADVERBS",
    "HEARSAY",
    "NEGATIONS",
    "OPENERS",
    "PLURAL",
    "VERDICTS",
    "Aspect",
    "is_extreme",
]


@dataclass(frozen=True)
class Aspect:
    """Subjects that share a set of qualities.

    Attributes:
        subjects: noun phrases.
        qualities: adjectives and their values.
    """

    subjects: tuple[str, ...]
    qualities: tuple[tuple[str, float], ...]


def _aspect(subjects: str, qualities: str) -> Aspect:
    """An aspect from "soup, fish" and "fresh 1.2, stale -1.6"."""
    pairs = (quality.rsplit(" ", 1) for quality in qualities.split(", "))
    names = tuple(f"the {subject}" for subject in subjects.split(", "))
    return Aspect(names, tuple((word, float(value)) for word, value in pairs))


_PEOPLE = (
    "friendly 1.4, kind 1.2, charming 2.0, helpful 1.3, polite 0.9, wonderful 2.2, attentive 1.5, quick 1.0, "
    "slow -1.1, careless -1.4, impatient -1.3, cold -1.2, rude -2.2, dreadful -2.4, forgetful -1.0, "
    "bored -0.8"
)

DOMAINS: dict[str, tuple[Aspect, ...]] = {
    "restaurant": (
        _aspect(
            "soup, curry, pasta, roast, fish, bread, pie, stew, rice, omelette, lamb, mushrooms, potatoes",
            "fresh 1.3, tasty 1.4, tender 1.1, warm 0.9, light 0.7, delicious 2.2, superb 2.4, dry -1.0, "
            "cold -1.3, bland -1.2, greasy -1.3, salty -0.9, stale -1.6, burnt -1.5, awful -2.2, inedible -2.6",
        ),
        _aspect(
            "beer, cider, lemonade, white wine, apple juice",
            "cold 1.2, crisp 1.3, fresh 1.0, sweet 0.5, superb 2.2, flat -1.3, warm -1.2, sour -0.9, "
            "watery -1.4, awful -2.2",
        ),
        _aspect("waiter, waitress, owner, cook, staff, barman, hostess", _PEOPLE),
        _aspect(
            "room, terrace, garden, corner table, bar, courtyard, dining room",
            "cosy 1.3, bright 0.8, quiet 1.0, clean 0.9, pretty 1.0, wonderful 2.0, noisy -1.2, dark -0.7, "
            "crowded -1.0, dirty -1.7, cold -1.1, filthy -2.4, small -0.4",
        ),
        _aspect(
            "bill, price, service charge, cover charge",
            "small 1.1, fair 1.2, modest 1.0, reasonable 1.1, high -1.2, steep -1.3, outrageous -2.2, unclear -0.9",
        ),
        _aspect(
            "portions, starters, desserts, side dishes",
            "generous 1.5, large 1.1, fresh 1.0, light 0.5, superb 2.2, small -1.1, heavy -0.8, dull -1.0, "
            "stale -1.5, awful -2.2",
        ),
    ),
    "hotel": (
        _aspect(
            "room, bed, bathroom, lobby, balcony, towels",
            "clean 1.3, soft 1.0, bright 0.8, large 0.9, quiet 1.1, superb 2.2, damp -1.3, dirty -1.7, "
            "small -0.8, dark -0.8, noisy -1.3, filthy -2.4, old -0.6",
        ),
        _aspect("porter, cleaner, manager, staff", _PEOPLE),
        _aspect(
            "rate, deposit, bill",
            "fair 1.2, small 1.0, modest 1.0, high -1.2, steep -1.3, outrageous -2.2",
        ),
        _aspect(
            "breakfast, coffee, toast, eggs",
            "fresh 1.2, warm 1.0, tasty 1.3, delicious 2.2, cold -1.3, weak -1.0, stale -1.5, burnt -1.4, awful -2.2",
        ),
    ),
    "film": (
        _aspect(
            "story, plot, ending, opening, second half",
            "clever 1.5, moving 1.4, funny 1.2, clear 0.7, brilliant 2.3, thin -1.0, slow -1.0, dull -1.5, "
            "confused -1.1, terrible -2.3, long -0.6",
        ),
        _aspect(
            "music, songs, pictures, costumes",
            "pretty 1.0, bright 0.8, fresh 1.1, superb 2.2, loud -0.9, cheap -1.2, dull -1.2, dreadful -2.3",
        ),
        _aspect(
            "actors, hero, villain, director",
            "brave 1.1, funny 1.3, charming 2.0, brilliant 2.3, wooden -1.5, bored -1.1, forgettable -1.2, "
            "dreadful -2.3",
        ),
    ),
    "shop": (
        _aspect(
            "coat, shoes, lamp, chair, radio, bag",
            "solid 1.2, soft 0.9, light 0.9, cheap 0.6, pretty 1.1, perfect 2.2, broken -1.9, weak -1.1, "
            "rough -0.9, heavy -0.7, dirty -1.3, useless -2.4",
        ),
        _aspect(
            "delivery, repair, reply",
            "quick 1.3, free 1.0, careful 1.2, slow -1.3, late -1.4, careless -1.3",
        ),
        _aspect("price, bill", "low 1.2, fair 1.2, small 1.1, high -1.2, steep -1.3, outrageous -2.2"),
        _aspect("seller, staff, owner", _PEOPLE),
    ),
}

PLURAL = frozenset(
    f"the {subject}"
    for subject in (
        "portions, starters, desserts, side dishes, mushrooms, potatoes, towels, eggs, songs, pictures, "
        "costumes, actors, shoes, staff"
    ).split(", ")
)


def is_extreme(value: float) -> bool:
    """Whether an adjective of this value is extreme: English says "very fresh" but "simply superb"."""
    return abs(value) >= 1.9


# What stands before an adjective, and the factor by which it multiplies the adjective's value.
ADVERBS: tuple[tuple[str, float], ...] = (
    ("", 1.0),
    ("very", 1.5),
    ("really", 1.4),
    ("too", 1.0),
    ("rather", 0.8),
    ("fairly", 0.7),
    ("a little", 0.5),
)
EXTREME_ADVERBS: tuple[tuple[str, float], ...] = (
    ("", 1.0),
    ("simply", 1.1),
    ("truly", 1.2),
    ("absolutely", 1.3),
)
NEGATIONS: tuple[tuple[str, float], ...] = (
    ("not", -0.7),
    ("hardly", -0.6),
    ("never", -0.9),
    ("far from", -1.0),
    ("anything but", -1.2),
)

# What other people said weighs little.
HEARSAY: tuple[str, ...] = (
    "a friend had told us that",
    "the guide had said that",
    "my sister had heard that",
    "the neighbours say that",
    "we had read that",
)

# Words without value.
OPENERS: tuple[str, ...] = (
    "on Sunday",
    "last Friday",
    "this time",
    "on our first visit",
    "after the concert",
    "that evening",
    "at lunch",
    "on a rainy day",
    "in the end",
    "for my birthday",
    "after a long walk",
    "once again",
    "before the theatre",
    "on a summer evening",
)
COMPANIONS: tuple[str, ...] = (
    "we came with friends",
    "I went with my brother",
    "we were a group of six",
    "I was on my own",
    "we had two hours",
    "we took the children along",
    "we stayed until late",
    "my parents came along",
    "we arrived early",
    "we had booked a week ahead",
    "we shared our table with strangers",
    "I ordered for everybody",
    "we sat near the window",
)
CLOSERS: tuple[str, ...] = (
    "that night",
    "on both days",
    "as far as I could tell",
    "from beginning to end",
    "when we were there",
    "in my opinion",
    "for the second time",
    "more or less all week",
)

# Sentences that end the reviews of the pretraining text, with the score that they suit.
VERDICTS: tuple[tuple[str, float], ...] = (
    ("we will never go again", -3.0),
    ("what a waste of an evening", -2.5),
    ("I want my money back", -2.2),
    ("I cannot recommend it", -1.6),
    ("we expected more", -1.0),
    ("it could have been better", -0.6),
    ("it was all right", 0.0),
    ("we may give it another try", 0.0),
    ("I do not know what to think", 0.0),
    ("it could have been worse", 0.6),
    ("we were content", 1.0),
    ("I can recommend it", 1.6),
    ("we were delighted", 2.2),
    ("what a lovely evening", 2.5),
    ("we will surely go again", 3.0),
)
