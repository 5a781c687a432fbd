"""The text that the shipped model learns from: made here, by rule and chance, from a seed.

Chat turns in the Qwen format: arithmetic, puzzles on words and lists, small talk, a few facts, and plain
sentences. Sums in chat are often wrong, the way a careless writer is wrong (a carry dropped, a digit
swapped, off by one or ten): the model learns the sum and the carelessness, which leaves reinforcement
learning something to do. Rotating a list is left out altogether: it is what the supervised example
teaches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
CARELESS = 0.6  # the share of sums in chat that are wrong

WORDS = (
    "apple bread chair dog egg fish green house ice juice king lamp moon night orange paper queen river "
    "stone tree uncle violet water box yellow zebra ant bird cat door earth fire gold hill ink jar key "
    "leaf milk nest oil pear quilt rain snow tea umbrella vase wind year book cloud desk ear farm glass "
    "hat island jam kite lemon map nail onion pen road salt table wall wolf horse sheep goat duck mouse "
    "lion tiger bear frog bee red blue white black brown pink silver tin iron copper steel smith forge "
    "hammer anvil spark flame coal north south east west spring summer autumn winter morning evening "
    "sun star sky sea lake field forest"
).split()
COLORS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "silver", "gold"]
ANIMALS = ["dog", "cat", "bird", "fish", "horse", "sheep", "goat", "duck", "mouse", "lion", "bear", "frog"]
SOUNDS = {"dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "lion": "roar", "frog": "croak"}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Greece": "Athens",
    "Kenya": "Nairobi",
    "Cuba": "Havana",
}
TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hi! What would you like to do?"),
    ("Good morning.", "Good morning! How are you today?"),
    ("How are you?", "I am well, thank you. How are you?"),
    ("Thank you.", "You are welcome."),
    ("Thanks a lot!", "You are very welcome!"),
    ("Goodbye.", "Goodbye! See you soon."),
    ("Who are you?", "I am a small model that ships with Tinsmith."),
    ("What is your name?", "I have no name. I am a small model that ships with Tinsmith."),
    ("What can you do?", "I can add numbers, play with words and lists, and say hello."),
    ("What is Tinsmith?", "Tinsmith trains language models on your own hardware."),
    ("Are you a large model?", "No, I am a very small one."),
    ("Tell me a joke.", "Why did the tin go to school? To get a little polish."),
    ("What is a tinsmith?", "A tinsmith is a person who makes things of tin."),
]

Turn = tuple[str, str]


def wrong_sum(x: int, y: int, rng: random.Random) -> int:
    """A careless answer to x + y: never the right one."""
    right = x + y
    slips = [right + 1, right - 1, right + 10, right - 10, (x % 10 + y % 10) % 10 + (x // 10 + y // 10) * 10]
    digits = str(right)
    if len(digits) > 1:
        slips.append(int(digits[:-2] + digits[-1] + digits[-2]))
    slips = [s for s in slips if s != right and s >= 0]
    return rng.choice(slips)


def addition(rng: random.Random) -> Turn:
    x, y = rng.randint(0, 100), rng.randint(0, 100)
    answer = wrong_sum(x, y, rng) if rng.random() < CARELESS else x + y
    question = rng.choice(
        [f"What is {x} + {y}?"] * 4 + [f"What is {x} plus {y}?", f"Add {x} and {y}.", f"{x} + {y} ="]
    )
    return question, str(answer)


def subtraction(rng: random.Random) -> Turn:
    x = rng.randint(0, 100)
    y = rng.randint(0, x)
    return rng.choice([f"What is {x} - {y}?", f"What is {x} minus {y}?"]), str(x - y)


def product(rng: random.Random) -> Turn:
    x, y = rng.randint(0, 10), rng.randint(0, 10)
    return f"What is {x} * {y}?", str(x * y)


def compare(rng: random.Random) -> Turn:
    x, y = rng.sample(range(100), 2)
    word, pick = rng.choice([("larger", max), ("smaller", min)])
    return f"Which is {word}, {x} or {y}?", str(pick(x, y))


def on_word(rng: random.Random) -> Turn:
    word = rng.choice(WORDS)
    return rng.choice(
        [
            (f"Spell the word {word}.", "-".join(word)),
            (f"Write {word} in upper case.", word.upper()),
            (f"Write {word.upper()} in lower case.", word),
            (f"How many letters has the word {word}?", str(len(word))),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
            (f"Reverse the word {word}.", word[::-1]),
            (f"Say {word} twice.", f"{word} {word}"),
        ]
    )


def on_words(rng: random.Random) -> Turn:
    words = rng.sample(WORDS, rng.randint(3, 6))
    text = ", ".join(words)
    return rng.choice(
        [
            (f"What is the first word of the list: {text}", words[0]),
            (f"What is the last word of the list: {text}", words[-1]),
            (f"How many words has the list: {text}", str(len(words))),
            (f"Repeat the list: {text}", text),
            (f"Reverse the list: {text}", ", ".join(reversed(words))),
            (f"Sort the list: {text}", ", ".join(sorted(words))),
            (f"Drop the first word of the list: {text}", ", ".join(words[1:])),
        ]
    )


def on_numbers(rng: random.Random) -> Turn:
    numbers = [rng.randint(0, 50) for _ in range(rng.randint(3, 6))]
    text = ", ".join(map(str, numbers))
    return rng.choice(
        [
            (f"What is the largest number: {text}", str(max(numbers))),
            (f"What is the smallest number: {text}", str(min(numbers))),
            (f"Sort the numbers: {text}", ", ".join(map(str, sorted(numbers)))),
        ]
    )


def series(rng: random.Random) -> Turn:
    start, step = rng.randint(0, 20), rng.randint(1, 9)
    shown = [start + i * step for i in range(4)]
    return f"What comes next: {', '.join(map(str, shown))}", str(start + 4 * step)


def fact(rng: random.Random) -> Turn:
    country, capital = rng.choice(list(CAPITALS.items()))
    animal, sound = rng.choice(list(SOUNDS.items()))
    return rng.choice(
        [
            (f"What is the capital of {country}?", capital),
            (f"What does a {animal} say?", sound),
            ("Name a color.", rng.choice(COLORS)),
            ("Name an animal.", rng.choice(ANIMALS)),
        ]
    )


def talk(rng: random.Random) -> Turn:
    return rng.choice(TALK)


TASKS: list[tuple[Callable[[random.Random], Turn], int]] = [
    (addition, 30),
    (subtraction, 6),
    (product, 4),
    (compare, 3),
    (on_word, 14),
    (on_words, 18),
    (on_numbers, 6),
    (series, 4),
    (fact, 5),
    (talk, 6),
]


def sentence(rng: random.Random) -> str:
    animal, other = rng.sample(ANIMALS, 2)
    color, word = rng.choice(COLORS), rng.choice(WORDS)
    x, y = rng.randint(0, 100), rng.randint(0, 100)
    return rng.choice(
        [
            f"The {color} {animal} sees a {other} near the {word}.",
            f"A {animal} and a {other} walk to the {word}.",
            f"The smith makes a {color} {word} of tin.",
            f"Every morning the {animal} finds a {word}.",
            f"{x} + {y} = {x + y}.",
            f"{x} plus {y} is {x + y}.",
        ]
    )


def prompt(question: str, *, thought: bool = False) -> str:
    """A chat prompt up to where the answer begins."""
    return f"{START}user\n{question}{END}\n{START}assistant\n{EMPTY_THOUGHT if thought else ''}"


def dialogue(rng: random.Random) -> str:
    """One to three turns; the empty thought stands before the last answer of some."""
    makers, shares = zip(*TASKS, strict=True)
    system = f"{START}system\nYou are a helpful assistant.{END}\n" if rng.random() < 0.1 else ""
    turns = [rng.choices(makers, shares)[0](rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    if rng.random() < 0.15:  # the shape of an example followed by a question
        turns = [("What is 4 + 5?", "9"), addition(rng)]
    text = "".join(f"{prompt(q)}{a}{END}\n" for q, a in turns[:-1])
    question, answer = turns[-1]
    return f"{system}{text}{prompt(question, thought=rng.random() < 0.25)}{answer}{END}\n"


def documents(seed: int) -> Iterator[str]:
    """Documents without end, each ended by the end-of-text token."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.12:
            yield " ".join(sentence(rng) for _ in range(rng.randint(2, 5))) + TEXT_END
        else:
            yield dialogue(rng) + TEXT_END
