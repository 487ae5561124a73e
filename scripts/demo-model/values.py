"""Random values to be copied: codes, paths, phrases, numbers. Every function draws from the generator it is given."""

import random

from encoder import ordinary_words
from words import ADJECTIVES, ENDINGS, FILLER, HELD_JOINTS, RESERVED, SYLLABLES

EXTENSIONS = "rs py txt md json yaml toml c h js ts go java sh csv log html css".split()
FOLDERS = "src lib docs tests app core util data config scripts api web server client build assets internal".split()
HEX, UPPER = "0123456789abcdef", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def invented(rng):
    """A word that no list holds."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(ENDINGS)


def vocabulary_word(rng):
    return rng.choice(ordinary_words())


def glued(rng):
    """A word that no list holds, of arbitrary pieces of the vocabulary: only its spelling can be copied."""
    return (vocabulary_word(rng) + vocabulary_word(rng))[: rng.randint(4, 14)]


def strange(rng):
    """Any word at all that is none of the held-out ones: what names in training are mostly made of."""
    while True:
        kind = rng.random()
        made = vocabulary_word(rng) if kind < 0.35 else glued(rng) if kind < 0.75 else invented(rng)
        if made not in RESERVED:
            return made


def near(rng, other):
    """A word that resembles `other`: a piece of its spelling is lost, changed or added."""
    while True:
        kind, cut = rng.randrange(4), rng.randint(1, 2)
        if kind == 0:
            made = other[cut:]
        elif kind == 1:
            made = rng.choice(SYLLABLES) + other[cut:]
        elif kind == 2:
            made = other[:-cut] + rng.choice(SYLLABLES + ENDINGS)
        else:
            made = other + rng.choice(SYLLABLES)
        if len(made) > 2 and made != other and made not in RESERVED:
            return made
        other += rng.choice(SYLLABLES)


# words that are values of a boolean: they join nothing
TRUTHS = frozenset(["true", "false", "yes", "no", "on", "off"])


def joint(rng, most=2, taken=frozenset()):
    """One or more arbitrary words that may stand between a name and its value, none of them `taken`; held-out phrases lend none."""
    words = []
    while not words or (len(words) < most and rng.random() < 0.5):
        made = rng.choice(FILLER) if rng.random() < 0.3 else vocabulary_word(rng)
        if made not in HELD_JOINTS and made not in TRUTHS and made not in taken:
            words.append(made)
    return " ".join(words)


def word(rng):
    kind = rng.random()
    return invented(rng) if kind < 0.25 else vocabulary_word(rng) if kind < 0.6 else rng.choice(FILLER)


def code(rng):
    """An identifier that can only be copied."""
    kind = rng.randrange(8)
    if kind == 0:
        return str(rng.randint(100, 999999))
    if kind == 1:
        return "".join(rng.choice(HEX) for _ in range(rng.randint(5, 12)))
    if kind == 2:
        return "".join(rng.choice(UPPER) for _ in range(rng.randint(2, 4))) + "-" + str(rng.randint(10, 99999))
    if kind == 3:
        return f"{rng.choice(ADJECTIVES)}-{word(rng)}-{rng.randint(1, 99)}"
    if kind == 4:
        return invented(rng)
    if kind == 5:
        return "".join(rng.choice(HEX + UPPER + "ghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 10)))
    if kind == 6:
        return f"{invented(rng)}_{rng.randint(1, 999)}"
    return f"{rng.choice(UPPER)}{rng.randint(1, 9)}{rng.choice(UPPER)}{rng.randint(10, 99)}{rng.choice(UPPER)}"


def phrase(rng, least=2, most=6):
    words = [word(rng) for _ in range(rng.randint(least, most))]
    if rng.random() < 0.3:
        words[0] = words[0].capitalize()
    return " ".join(words)


def path(rng):
    parts = [rng.choice(FOLDERS) if rng.random() < 0.6 else invented(rng) for _ in range(rng.randint(0, 3))]
    stem = word(rng) if rng.random() < 0.7 else f"{word(rng)}_{word(rng)}"
    start = rng.choice(["", "", "", "", "/", "./", "../"])
    return start + "/".join([*parts, f"{stem}.{rng.choice(EXTENSIONS)}"])


def folder(rng):
    parts = [rng.choice(FOLDERS) if rng.random() < 0.6 else invented(rng) for _ in range(rng.randint(1, 3))]
    return rng.choice(["", "", "./", "/"]) + "/".join(parts)


def command(rng):
    return rng.choice([
        lambda: f"ls -la {folder(rng)}", lambda: f"cat {path(rng)}", lambda: f"grep -rn {word(rng)} {folder(rng)}",
        lambda: "cargo test", lambda: f"cargo test -p {invented(rng)}", lambda: f"pytest {path(rng)}", lambda: "git status",
        lambda: "git diff", lambda: f"python {path(rng)} --{word(rng)} {rng.randint(1, 99)}", lambda: "make", lambda: "pwd",
        lambda: f"make {word(rng)}", lambda: f"rm {path(rng)}", lambda: f"mkdir -p {folder(rng)}", lambda: f"wc -l {path(rng)}",
        lambda: f"echo {phrase(rng, 1, 3)}", lambda: f"find {folder(rng)} -name {word(rng)}", lambda: f"head -n {rng.randint(1, 99)} {path(rng)}",
    ])()


def sentence(rng):
    words = [rng.choice(FILLER) for _ in range(rng.randint(4, 13))]
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 5)):
            words[rng.randrange(len(words))] = vocabulary_word(rng)
    if rng.random() < 0.1:
        words[rng.randrange(len(words))] = rng.choice([code, invented])(rng)
    return " ".join(words).capitalize() + rng.choice("......?!")


def paragraph(rng, sentences):
    return " ".join(sentence(rng) for _ in range(sentences))


def page(rng, sentences):
    """Text as system prompts and manuals have it: headings, lists, paragraphs, a little code."""
    blocks, left = [], sentences
    while left > 0:
        kind, size = rng.random(), min(left, rng.randint(1, 5))
        if kind < 0.5:
            blocks.append(paragraph(rng, size))
        elif kind < 0.7:
            blocks.append("\n".join(f"- {sentence(rng)}" for _ in range(size)))
        elif kind < 0.8:
            blocks.append("#" * rng.randint(1, 3) + " " + phrase(rng, 1, 4).capitalize())
        elif kind < 0.9:
            blocks.append("```\n" + "\n".join(code_lines(rng, size)) + "\n```")
        else:
            blocks.append("\n".join(f"{n}. **{word(rng)}**: `{code(rng)}` {phrase(rng)}" for n in range(1, size + 1)))
        left -= size
    return "\n\n".join(blocks)


def code_lines(rng, lines):
    """Lines that look like a program; each has a name that only it has."""
    out = []
    for _ in range(lines):
        name, other = f"{word(rng)}_{invented(rng)}", invented(rng)
        out.append(rng.choice([
            f"{name} = {other}({rng.randint(0, 99)})", f"def {name}({other}):", f"    return {name} + {rng.randint(0, 99)}",
            f"import {name}", f"if {name} > {rng.randint(0, 999)}:", f"    {name}.{other}()", f"let {name} = {other};",
            f"fn {name}() -> {other} {{", f"# {name} {other}", f"print({name}, {other})",
        ]))
    return out


def generator(*seed):
    return random.Random(":".join(map(str, seed)))
