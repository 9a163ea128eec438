"""Neutral captions from a small grammar of the project's own: everyday things, in the words that captions of clips use.

Made anew whenever they are asked for, always the same. A caption is a subject, what it does, where, and now and then the
light and how it is filmed; what a subject can do follows from its kind.
"""

import random

NUM_CAPTIONS = 4_000


def _options(text: str) -> list[str]:
    return text.split("|")


_COLOURS = _options(
    "red|blue|green|yellow|white|black|grey|brown|orange|purple|pink|golden|silver|dark|pale|turquoise|beige"
)
_QUALITIES = _options(
    "small|large|old|new|tall|narrow|round|long|quiet|bright|heavy|light|wooden|plain|striped|dusty|wet|shiny|soft|broken"
)
_OF_PEOPLE = _options("young|old|tall|cheerful|tired|quiet|smiling|curious|busy")
_CLOTHES = _options("coat|scarf|hat|shirt|sweater|raincoat|jacket|apron")
_PEOPLE = _options(
    "woman|man|child|baker|painter|gardener|teacher|doctor|farmer|fisherman|musician|dancer|runner|cyclist|sailor|"
    "carpenter|waiter|tourist|student|shepherd|climber|skater|mechanic|photographer|couple|group of friends"
)
_PEOPLE_DO = _options(
    "walks slowly|reads a book|drinks tea|writes a letter|looks out of a window|carries a basket|opens an umbrella|"
    "laughs and waves|plays the guitar|paints a picture|cuts bread|waters flowers|ties a shoe|rides a bicycle|takes a photograph|"
    "stirs a pot of soup|folds a sheet of paper|talks on the phone|sweeps the floor|climbs a ladder|dances alone|"
    "puts on a coat|feeds the birds|turns the pages of a newspaper|repairs a chair|throws a ball|holds a lantern|"
    "sits down and rests|runs past|stands still and listens"
)
_ANIMALS = _options(
    "dog|cat|horse|cow|sheep|goat|rabbit|fox|deer|bear|elephant|lion|owl|eagle|swan|duck|heron|seagull|parrot|turtle|frog|"
    "whale|dolphin|butterfly|squirrel|hedgehog|camel|penguin"
)
_ANIMALS_DO = _options(
    "runs|sleeps|drinks water|looks around|shakes its head|jumps over a log|turns towards the camera|eats|rests in the shade|"
    "moves slowly|stretches|waits|plays with a leaf|swims|comes closer|walks away"
)
_VEHICLES = _options(
    "car|bus|train|tram|truck|motorcycle|sailing boat|ferry|canoe|tractor|airplane|helicopter|hot air balloon|bicycle|"
    "fishing boat|steam train|taxi|van"
)
_VEHICLES_DO = _options(
    "passes from left to right|stops|turns a corner|drives away|comes closer|stands still|crosses the picture|slows down|"
    "moves through the rain|waits with its lights on|leaves a trail of dust|disappears behind a hill"
)
_THINGS = _options(
    "ball|cup|bottle|lamp|chair|table|clock|book|vase|candle|umbrella|hat|shoe|basket|box|key|mirror|bell|kite|flag|balloon|"
    "bowl of fruit|loaf of bread|glass of water|piano|guitar|pencil|letter|blanket|suitcase|statue|wheel|rope|window|door"
)
_THINGS_DO = _options(
    "lies there|stands on its own|falls over|rolls away|turns slowly|swings in the wind|catches the light|is covered with snow|"
    "casts a long shadow|is reflected in a puddle|floats on water|leans against a wall|hangs from a hook|shines"
)
_NATURE = _options(
    "river|waterfall|lake|cloud|forest|mountain|meadow|field of wheat|desert|glacier|volcano|thunderstorm|rainbow|sea|island|"
    "cliff|valley|path|garden|apple tree|sunflower|rose|mossy stone|full moon|night sky|fire|dune|swamp"
)
_NATURE_DO = _options(
    "lies in the fog|glows|moves in the wind|is seen from above|stretches to the horizon|slowly becomes dark|is covered with ice|"
    "sparkles|is calm|changes its colours|fills the picture|appears behind the hills"
)
_PLACES = _options(
    "in a kitchen|in a garden|on a beach|in the mountains|in a busy street|at a market|in a library|on a bridge|in a forest|"
    "by a river|on a rooftop|in a workshop|in a railway station|at the harbour|in a classroom|in a museum|on a farm|in the snow|"
    "in a desert|beside a lake|under a tree|in an empty room|in front of a brick wall|on a hill|in a small village|"
    "at a bus stop|in a greenhouse|near a lighthouse|on a wooden floor|beside a fireplace|in a courtyard|behind a window"
)
_LIGHTS = _options(
    "at sunrise|at noon|at dusk|at night|in the fog|in the rain|in bright sunlight|by candlelight|under a cloudy sky|"
    "in the light of the moon|on a winter day|in autumn|in soft light|with long shadows|under neon signs"
)
_STYLES = _options(
    "a close-up of {}|a wide shot of {}|a slow zoom on {}|an aerial view of {}|a film of {}|a photograph of {}|"
    "a watercolour of {}|a black and white picture of {}|an animated film of {}|a pencil drawing of {}|"
    "the camera follows {}|the camera turns around {}"
)
_ENDINGS = _options(
    "the background is out of focus|the colours are warm|the colours are cold|everything is in focus|the picture is very still|"
    "the movement is slow|few details can be seen|the light changes|nothing else is in the picture|seen from a low angle|"
    "seen from behind|seen from the side"
)
_PEOPLE_TOO = (_PEOPLE, _PEOPLE_DO)
_Kind = tuple[list[str], list[str]]
_KINDS: tuple[_Kind, ...] = (
    _PEOPLE_TOO,
    (_ANIMALS, _ANIMALS_DO),
    (_VEHICLES, _VEHICLES_DO),
    (_THINGS, _THINGS_DO),
    (_NATURE, _NATURE_DO),
)


def neutral_captions(count: int = NUM_CAPTIONS) -> tuple[str, ...]:
    """The first `count` captions, all different; the same on every machine and in every version of Python."""
    draws = random.Random("neutral captions")
    found: dict[str, None] = {}
    while len(found) < count:
        found[_caption(draws)] = None
    return tuple(found)


def _caption(draws: random.Random) -> str:
    """One caption, from a few words to some thirty."""
    caption = _scene(draws)
    if draws.random() < 0.35:
        caption = _one(draws, _STYLES).format(_subject(draws, _kind(draws))) + " " + _one(draws, _PLACES)
    if draws.random() < 0.2:
        caption += f", and beside it {_subject(draws, _kind(draws))}"
    if draws.random() < 0.4:
        caption += f" {_one(draws, _LIGHTS)}"
    if draws.random() < 0.3:
        caption += f", {_one(draws, _ENDINGS)}"
    return caption


def _scene(draws: random.Random) -> str:
    kind = _kind(draws)
    scene = f"{_subject(draws, kind)} {_one(draws, kind[1])}"
    return scene if draws.random() < 0.25 else f"{scene} {_one(draws, _PLACES)}"


def _subject(draws: random.Random, kind: _Kind) -> str:
    """Colours are those of things; of people those of what they wear."""
    is_person = kind is _PEOPLE_TOO
    words = []
    if draws.random() < 0.3:
        words.append(_one(draws, _OF_PEOPLE if is_person else _QUALITIES))
    colour = _one(draws, _COLOURS) if draws.random() < 0.4 else ""
    if colour and not is_person:
        words.append(colour)
    words.append(_one(draws, kind[0]))
    if colour and is_person:
        words.append(f"in {_article(colour)} {_one(draws, _CLOTHES)}")
    return _article(" ".join(words))


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _kind(draws: random.Random) -> _Kind:
    return _KINDS[int(draws.random() * len(_KINDS))]


def _one(draws: random.Random, options: list[str]) -> str:
    # By `random` alone, whose numbers are the same in every version of Python.
    return options[int(draws.random() * len(options))]
