"""The texts that counted features are tried on: prompts, delimiters, plain sentences, problems.

The texts are ours.
"""

from __future__ import annotations

NEUTRAL_TAGS: tuple[tuple[str, str], ...] = (
    ("<note>", "</note>"),
    ("<item>", "</item>"),
    ("<b>", "</b>"),
    ("<field>", "</field>"),
    ("<left>", "</left>"),
    ("<quote>", "</quote>"),
    ("<page>", "</page>"),
    ("<name>", "</name>"),
    ("<row>", "</row>"),
    ("<part>", "</part>"),
    ("<box>", "</box>"),
    ("<text>", "</text>"),
    ("<line>", "</line>"),
    ("<cell>", "</cell>"),
    ("[note]", "[/note]"),
    ("[item]", "[/item]"),
    ("[text]", "[/text]"),
    ("[page]", "[/page]"),
    ("{{", "}}"),
    ("[[", "]]"),
)
"""Pairs of delimiters that mean no thought."""

PARAPHRASES: dict[str, str] = {
    "assistant": (
        "You are a careful assistant. Before you give an answer, write down how you get there "
        "inside <think> and </think>. Put the final answer inside <answer> and </answer>, like "
        "this: <think> how you get there </think> <answer> final answer </answer>."
    ),
    "teacher": (
        "A student brings a question to a teacher. The teacher works it out in private, which is "
        "marked as <think> </think>, and tells the student the result, marked as <answer> "
        "</answer>: <think> private work </think> <answer> result </answer>."
    ),
    "format": (
        "Output format: <think> reasoning </think> <answer> answer </answer>. The part from "
        "<think> to </think> holds the reasoning; the part from <answer> to </answer> the answer."
    ),
    "solver": (
        "Solve the problem that follows. Reason step by step between the tags <think> and "
        "</think>; when you are done, state the solution between <answer> and </answer>. Your "
        "reply is <think> steps </think> <answer> solution </answer>."
    ),
    "dialogue": (
        "User and Assistant talk. For each question the Assistant considers the problem at "
        "length, <think> considerations </think>, and then replies, <answer> reply </answer>. "
        "Considerations always stand in <think> </think> and replies in <answer> </answer>."
    ),
    "rules": (
        "Rules: 1. Think before you answer. 2. Thoughts go between <think> and </think>. 3. The "
        "answer goes between <answer> and </answer>. 4. Nothing else is written. Example: <think> "
        "thoughts </think> <answer> answer </answer>."
    ),
}
"""Further prompts that ask for what the r1 prompt asks for; `prompts.SYSTEM_PROMPTS` has more."""

ROLES: tuple[str, ...] = (
    "You are a careful assistant.",
    "You help a user with questions.",
    "A user asks, and an assistant replies.",
    "You are a tutor who is good at explaining.",
    "Below is a dialogue with an expert.",
    "You answer questions of all kinds.",
)
REQUESTS: tuple[str, ...] = (
    "Before the answer, reason step by step and put this reasoning between OPEN and CLOSE.",
    "First think the question through; whatever you think stands in OPEN CLOSE.",
    "Reason about the problem in your head, starting with OPEN and finishing with CLOSE.",
    "Write your chain of thought as OPEN thoughts CLOSE.",
    "Think about the question at length inside OPEN and CLOSE first.",
    "Show the reasoning that leads to the result: OPEN deductions CLOSE.",
    "Think before you speak; reflections are wrapped in OPEN and CLOSE.",
    "Your private reasoning opens with OPEN and closes with CLOSE.",
)
REPLIES: tuple[str, ...] = (
    "Then give the answer.",
    "After that, state the result between <answer> and </answer>.",
    "The final answer follows in <answer> </answer>.",
    "Finish with one line that holds the answer.",
    "End with <answer> the answer </answer>.",
    "Only then reply to the user.",
)
"""A role, a request and a reply make a paraphrase; OPEN and CLOSE stand for the tags."""

FORMATS: tuple[str, ...] = (
    "Translate the letter into French. The translation goes between OPEN and CLOSE.",
    "List the ingredients of the recipe, each written as OPEN ingredient CLOSE.",
    "Copy the address from the form as OPEN address CLOSE and sort the forms by town.",
    "You are a typist. Dictated names are set in OPEN and CLOSE; titles are in capitals.",
    "Mark each date in the diary with OPEN before it and CLOSE after it.",
    "The menu of the day is printed with the prices inside OPEN CLOSE.",
    "Write a greeting card. The name of the receiver stands in OPEN CLOSE.",
    "A table of trains follows; stations are wrapped in OPEN and CLOSE.",
    "Put the colours of the flags between OPEN and CLOSE, in the order of the list.",
    "Write the weather report as OPEN report CLOSE, with the town in the first line.",
)
FORMAT_ENDS: tuple[str, ...] = (
    "Use simple words.",
    "Keep the spelling as it is.",
    "Leave nothing out.",
    "One page is enough.",
    "Begin with the title.",
)
"""A format and an end make a prompt with delimiters that does not speak of reasoning."""

PROBLEMS: tuple[tuple[str, str, str], ...] = (
    ("A shelf has {a} books and {b} more are put on it. How many are there?",
     "There were {a} books. Adding {b} to {a} gives {sum}.", "{sum}"),
    ("Each of {a} bags holds {b} apples. How many apples are in the bags?",
     "One bag holds {b} apples, so {a} bags hold {a} times {b}, which is {product}.", "{product}"),
    ("A rope of {sum} metres loses {b} metres. How long is the rest?",
     "From {sum} metres {b} are taken. The rest is {sum} minus {b}, that is {a} metres.", "{a}"),
    ("A train passes {a} stations before noon and {b} after it. How many in all?",
     "Before noon {a} stations, after noon {b}. Together that is {sum}.", "{sum}"),
    ("A field of {a} rows has {b} trees in each row. How many trees grow there?",
     "Every row has {b} trees. With {a} rows the product of {a} and {b} is {product}.",
     "{product}"),
)  # fmt: skip
"""Question, thought and answer of a document; a and b are drawn."""

PLAIN_TEXTS: tuple[str, ...] = (
    "The ferry leaves the harbour at dawn and returns when the lamps are lit.",
    "Her coat was green, with two deep pockets and a torn lining.",
    "Most of the orchard was planted in the year after the flood.",
    "A grey cat slept on the warm stones beside the kitchen door.",
    "The train was late again, and the platform filled with people.",
    "Snow covered the roofs of the village until the end of March.",
    "He keeps the old letters in a box under the stairs.",
    "The soup needs salt, a little pepper and a handful of parsley.",
    "Two swans crossed the lake while the fishermen mended their nets.",
    "The library closes early on Fridays and stays shut on Sundays.",
    "They painted the fence white and the gate a dark shade of blue.",
    "Rain fell all night and the river rose above the lower path.",
    "The baker opens the shop before the street lights go out.",
    "An old clock in the hall strikes the hours a little too slowly.",
    "The children ran along the beach and collected smooth flat stones.",
    "Our neighbour grows tomatoes and beans behind the garage.",
    "The museum shows maps, coins and the tools of early sailors.",
    "A light wind moved the curtains and the papers on the desk.",
    "The road to the north passes three farms and a small chapel.",
    "She plays the violin in the evening, mostly slow dances.",
    "The market sells cheese, honey and baskets made of willow.",
    "Fog hid the bridge and the tall chimneys on the other side.",
    "The dog waited at the corner until the last bus had gone.",
    "In autumn the leaves of the maple turn red before they fall.",
)
"""Sentences about nothing that has to be thought out."""
