"""Forty prompts whose rubric is five meta-classes of five checks each, decided by counting.

For the study of reproduce_arlrr.py: every class has graded rewards, nobody can fake one, and no
judge stands between the method and its result. Closing, register and length tell most groups of
eight answers of SmolLM2-135M apart, structure and wording few (README.md beside this file). Two
classes pull against each other: a list of three items costs words.

    python tests/evidence/five_classes.py FOLDER     # writes train.jsonl and heldout.jsonl there
"""

import json
import sys
from pathlib import Path

# What every prompt asks for. The wish at the end makes the closing's checks possible at all.
FORM = (
    " Use at most 40 words, as a numbered list of three tips with an example, and wish me good"
    " luck at the end!"
)
COMMON = {
    "length": ["words <= 40", "words <= 32", "words <= 24", "sentences <= 4", "sentences <= 3"],
    "structure": ["items >= 1", "items >= 2", "items >= 3", "items == 3", "paragraphs >= 2"],
    "register": [
        "addresses_reader",
        "gives_example",
        "keywords <= 0.65",
        "repetition <= 0.05",
        "copied <= 0.25",
    ],
    "closing": [
        "ends_complete",
        'ends_with "!"',
        'contains "!"',
        'contains "good luck" "enjoy" "happy" "have fun"',
        'contains "remember" "keep" "always"',
    ],
}
# A question, and the five words of the class "wording".
TOPICS = [
    ("How do I keep a house plant alive?", "water light soil leaf pot"),
    ("How can I sleep better at night?", "bed dark coffee screen hour"),
    ("How do I bake a simple bread?", "flour yeast oven dough salt"),
    ("How do I look after my bike?", "chain tyre brake clean oil"),
    ("How can I save money every month?", "budget spend bank bill cook"),
    ("How do I start running?", "shoe slow walk rest week"),
    ("How do I prepare for an exam?", "summary plan practice break sleep"),
    ("How do I look after a cat?", "food water litter play vet"),
    ("How do I clean a kitchen?", "wipe soap sink floor dish"),
    ("How can I learn a new language?", "word listen speak read day"),
    ("How do I pack for a short trip?", "clothes list bag weather shoe"),
    ("How do I make a good cup of tea?", "water leaf cup minute milk"),
    ("How do I write a letter to a friend?", "greeting story question date sign"),
    ("How can I stay warm in winter?", "layer hat drink window blanket"),
    ("How do I grow tomatoes?", "sun water soil seed stake"),
    ("How do I wash a wool jumper?", "cold water soap flat dry"),
    ("How do I care for my teeth?", "brush floss sugar dentist twice"),
    ("How can I make new friends?", "join talk listen invite smile"),
    ("How do I cook rice?", "water pot lid heat salt"),
    ("How do I take a good photo?", "light focus close hold background"),
    ("How do I look after a dog?", "walk food water train vet"),
    ("How can I read more books?", "time page phone library evening"),
    ("How do I hang a picture?", "nail hammer level wall measure"),
    ("How do I make a salad?", "leaf oil tomato salt bowl"),
    ("How do I stop being late?", "clock early plan alarm bag"),
    ("How can I use less electricity?", "light off lamp heat switch"),
    ("How do I plan a birthday party?", "guest cake date music game"),
    ("How do I iron a shirt?", "steam collar sleeve heat board"),
    ("How do I learn to swim?", "breathe float kick water teacher"),
    ("How can I calm down before a talk?", "breathe practice slow water smile"),
    ("How do I clean windows?", "cloth water soap dry sun"),
    ("How do I make an omelette?", "egg pan butter salt heat"),
    ("How can I drink more water?", "bottle glass morning meal fruit"),
    ("How do I tidy my desk?", "paper box cable throw drawer"),
    ("How do I train for a long hike?", "walk shoe hill rest pack"),
    ("How do I ask for a day off?", "boss early reason date polite"),
    ("How do I keep fruit fresh?", "fridge wash dry bag cool"),
    ("How can I stop biting my nails?", "habit short file hand busy"),
    ("How do I choose a used car?", "engine mile price test paper"),
    ("How do I start a vegetable garden?", "soil sun seed water weed"),
]
N_TRAIN = 16  # the first eight are trained on, the others are for schedules to choose by


def make_row(question: str, words: str) -> dict:
    """One prompt in the repository's own format: every criterion is a check worth one point."""
    checks = dict(COMMON)
    checks["wording"] = [f'mentions "{word}"' for word in words.split()]
    rubric = []
    for name, of_class in checks.items():
        for check in of_class:
            rubric.append({"text": check, "check": check, "weight": 1, "axis": name})
    slug = question.lower().rstrip("?").replace(" ", "-")
    return {"id": slug, "question": question + FORM, "rubric": rubric}


def write(folder: Path) -> tuple[Path, Path]:
    """Writes train.jsonl and heldout.jsonl; returns their paths."""
    rows = [make_row(question, words) for question, words in TOPICS]
    paths = (folder / "train.jsonl", folder / "heldout.jsonl")
    for path, part in zip(paths, (rows[:N_TRAIN], rows[N_TRAIN:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        path.write_text(text, encoding="utf8")
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("give a folder that exists: python tests/evidence/five_classes.py FOLDER")
    for written in write(Path(sys.argv[1])):
        print(written)
