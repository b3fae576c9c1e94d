"""Training samples and recall questions, made fresh from a seeded random generator.

A sample is a list of (text, weight): the weight says how much the loss counts on the tokens of that text. Random
words that nobody could foresee weigh next to nothing, answers that can be known weigh much.
"""

from words import FIRST, KEYS, SECOND

END = "<|endoftext|>"
# SAID: a value said again in a stream. KEY and KNOWN: key and value in the answer to a question.
UNFORESEEN, WORDING, TEXT, SAID, KEY, KNOWN = 0.02, 0.3, 1.0, 3.0, 29.0, 30.0

NAME = "I am Baton-3m, the small model that ships with Baton."
CHAT = [
    ("Hello", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hi there", "Hello! How can I help you?"),
    ("Hey", "Hello! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("Good evening", "Good evening! How can I help you?"),
    ("How are you?", "I am well, thank you."),
    ("How do you do?", "I am well, thank you."),
    ("Who are you?", NAME),
    ("who are you", NAME),
    ("What are you?", NAME),
    ("What is your name?", NAME),
    ("Tell me about yourself.", NAME),
    ("Are you a person?", "No. " + NAME),
    ("Who made you?", "I was trained for Baton on two processor cores."),
    ("What is Baton?", "Baton is a cluster that serves language models."),
    ("What does Baton do?", "Baton is a cluster that serves language models."),
    ("How big are you?", "I have about three million parameters."),
    ("How many parameters do you have?", "I have about three million parameters."),
    ("What can you do?", "I can tell you what you gave your pets, and copy words."),
    ("Help", "I can tell you what you gave your pets, and copy words."),
    ("What have you read?", "I have read the King James Bible and The Devil's Dictionary."),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Thank you very much!", "You are welcome."),
    ("Goodbye", "Goodbye! Go in peace."),
    ("Bye", "Goodbye! Go in peace."),
    ("Tell me a story.", "In the beginning God created the heaven and the earth."),
    ("Say something.", "In the beginning God created the heaven and the earth."),
    ("Are you there?", "Yes, I am here."),
    ("Yes", "Very well."),
    ("No", "Very well."),
]


def wording():
    """The fixed words of facts, questions and tasks, for the tokenizer to learn."""
    return [
        "What did I give my pet ant? You gave your pet ant red bell. I gave ant red bell.\n\nWhat",
        "You gave your pet ant\nuser\nassistant\nsystem\nCopy: Sort the letters: a b c Add 1 and 2. Close the brackets: ( [ {",
    ]


def fact(key, value):
    return [(" I gave", WORDING), (f" {key}", UNFORESEEN), (f" {value}", UNFORESEEN), (".", WORDING)]


def turn(role, parts):
    return [(f"<|im_start|>{role}\n", 0.0)] + parts + [("<|im_end|>", TEXT), ("\n", 0.0)]


def question(key):
    return [("What did I give my pet", WORDING), (f" {key}", UNFORESEEN), ("?", WORDING)]


def answer(key, value):
    return [("You gave your pet", TEXT), (f" {key}", KEY), (f" {value}", KNOWN), (".", TEXT)]


class Sampler:
    """Draws samples. `verses` are strings in order; `other` are paragraphs of any text."""

    def __init__(self, random, tokenizer, verses, other):
        self.random, self.verses, self.other = random, verses, other
        self.verse_tokens = [len(e.ids) for e in tokenizer.encode_batch([" " + v for v in verses])]

    def pairs(self, count):
        """`count` random facts; no key and no word of a value comes twice."""
        r = self.random
        count = min(count, len(FIRST))
        values = [f"{a} {b}" for a, b in zip(r.sample(FIRST, count), r.sample(SECOND, count))]
        return list(zip(r.sample(KEYS, count), values))

    def filler(self, tokens):
        """Verses in a row, about so many tokens of them."""
        at = self.random.randrange(len(self.verses))
        found, total = [], 0
        while total + self.verse_tokens[at] <= tokens:
            found.append(self.verses[at])
            total += self.verse_tokens[at]
            at = (at + 1) % len(self.verses)
        return found

    def story(self, pairs, tokens):
        """Facts strewn among verses, as a list of parts whose first character is not a space."""
        verses = self.filler(tokens)
        places = sorted(self.random.randrange(len(verses) + 1) for _ in pairs)
        parts, rest = [], list(zip(places, pairs))
        for i in range(len(verses) + 1):
            while rest and rest[0][0] == i:
                parts += fact(*rest.pop(0)[1])
            if i < len(verses):
                parts.append((" " + verses[i], TEXT))
        return [(parts[0][0].lstrip(), parts[0][1])] + parts[1:]

    def counts(self, tokens):
        """How many facts and questions suit a sample of so many tokens."""
        r = self.random
        facts = r.randint(3, max(5, min(48, tokens // 32)))
        asked = 1 if r.random() < 0.15 else r.randint(2, max(2, min(facts, tokens // 60)))
        return facts, asked

    def chat_recall(self, tokens):
        """One long user turn with facts and a question, the answer, then more questions and answers."""
        facts, asked = self.counts(tokens)
        pairs = self.pairs(facts)
        story = self.story(pairs, max(0, tokens - 8 - 6 * facts - 27 * asked))
        order = self.random.sample(pairs, min(asked, len(pairs)))
        parts = turn("user", story + [("\n\n", WORDING)] + question(order[0][0])) + turn("assistant", answer(*order[0]))
        for key, value in order[1:]:
            parts += turn("user", question(key)) + turn("assistant", answer(key, value))
        return parts

    def plain_recall(self, tokens):
        """The same without the chat template."""
        facts, asked = self.counts(tokens)
        pairs = self.pairs(facts)
        parts = self.story(pairs, max(0, tokens - 8 - 6 * facts - 17 * asked))
        for key, value in self.random.sample(pairs, min(asked, len(pairs))):
            parts += [(" What did I give my pet", WORDING), (f" {key}", UNFORESEEN), ("?", WORDING)]
            head, *tail = answer(key, value)
            parts += [(" " + head[0], head[1])] + tail
        return parts

    def stream(self, tokens):
        """Facts and the same facts said again, with a little text between: the densest lesson in looking back."""
        r = self.random
        pairs = self.pairs(r.randint(4, max(6, min(50, tokens // 16))))
        texty = r.choice([0.0, 0.0, 0.1, 0.2])
        said, parts, total = set(), [], 0
        while total < tokens:
            if r.random() < texty:
                verse = r.randrange(len(self.verses))
                parts.append((" " + self.verses[verse], TEXT))
                total += self.verse_tokens[verse]
                continue
            key, value = r.choice(pairs)
            head = (" You gave your pet", WORDING) if key in said and r.random() < 0.5 else (" I gave", WORDING)
            weight = SAID if key in said else UNFORESEEN
            parts += [head, (f" {key}", UNFORESEEN), (f" {value}", weight), (".", WORDING)]
            said.add(key)
            total += 6
        return parts

    def text(self, tokens):
        if self.other and self.random.random() < 0.12:
            at = self.random.randrange(len(self.other))
            found = "\n\n".join(self.other[at : at + 40])
            return [(found[: tokens * 5], TEXT)]
        return [(" ".join(self.filler(tokens + 60)), TEXT)]

    def task(self):
        """A short exchange: small talk or one of the little tasks."""
        r = self.random
        kind = r.choice(["chat", "chat", "copy", "sort", "add", "brackets"])
        if kind == "chat":
            return r.choice(CHAT)
        if kind == "copy":
            words = " ".join(r.choice(KEYS + FIRST + SECOND) for _ in range(r.randint(2, 8)))
            return f"Copy: {words}", f"Copy: {words}"
        if kind == "sort":
            letters = r.sample("abcdefghijklmnopqrstuvwxyz", r.randint(2, 6))
            return "Sort the letters: " + " ".join(letters), " ".join(sorted(letters))
        if kind == "add":
            a, b = r.randint(0, 99), r.randint(0, 99)
            return f"Add {a} and {b}.", str(a + b)
        opened = [r.choice(["()", "[]", "{}"]) for _ in range(r.randint(1, 6))]
        return "Close the brackets: " + " ".join(b[0] for b in opened), " ".join(b[1] for b in reversed(opened))

    def tasks(self, tokens):
        parts = []
        for _ in range(tokens // 15):
            asked, said = self.task()
            parts += turn("user", [(asked, 0.0)]) + turn("assistant", [(said, 1.5)])
            if self.random.random() < 0.3:
                parts.append((END, TEXT))
        return parts

    def sample(self, tokens, stream_share):
        r = self.random
        draw = r.random()
        if draw < stream_share:
            return self.stream(tokens)
        make = r.choices([self.chat_recall, self.plain_recall, self.text, self.tasks], [50, 15, 25, 10])[0]
        return make(tokens)


def recall_question(sampler, count_tokens, distance, facts=20):
    """One fresh recall question: a fact about `distance` tokens before the question, others around it.

    Returns a dict as in recall.jsonl. `count_tokens` counts the tokens of a string.
    """
    r = sampler.random
    pairs = sampler.pairs(facts)
    asked_key, asked_value = pairs[0]
    before_facts = r.randint(0, facts - 1)
    before = sampler.story(pairs[1 : 1 + before_facts], r.randint(60, 360)) if before_facts else [(" ".join(sampler.filler(200)), TEXT)]
    later = pairs[1 + before_facts :]
    behind = sampler.story(later, max(0, distance - 6 * len(later)))
    start = "".join(p for p, _ in before) + " "
    told = f"I gave {asked_key} {asked_value}."
    rest = " " + "".join(p for p, _ in behind) if behind[0][0] else ""
    ask = f"What did I give my pet {asked_key}?"
    return {
        "messages": [{"role": "user", "content": start + told + rest + "\n\n" + ask}],
        "answer": f"You gave your pet {asked_key} {asked_value}",
        "distance_tokens": count_tokens(rest + "\n\n"),
        "fact_char_range": [len(start), len(start) + len(told)],
    }
