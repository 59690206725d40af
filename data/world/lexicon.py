"""The words of the little world, grouped by what they mean.

Lists are plain strings split at blanks. Names of people and places are compounds made from parts, so that the world
has thousands of them without a table of thousands of lines; the parts are ordinary English morphemes.
"""

FIRST_NAMES = """Ada Adam Agnes Alan Alba Alec Alma Amos Amy Anna Arlo Arne Aron Basil Beate Bela Ben Berta Bjorn Boris
Bruno Carl Carla Cara Cato Celia Clara Clive Cora Dana Daria David Della Dora Doris Edgar Edith Egon Elena Eli Elsa Emil
Emma Enzo Erik Erna Ernst Ethel Eva Fanny Felix Fiona Flora Franz Freya Gerda Gina Greta Gus Hanna Hans Harriet Hector Hedda
Helga Henry Hilda Hugo Ida Igor Ilse Inga Iris Ivan Ivo Jack Jana Jasper Joan Jonas Josef Judith Julia Karim Karl Kate Klara
Kurt Lars Laura Lena Leo Lily Linus Lisa Lotte Louis Lucas Lucy Luis Mabel Magda Maja Marco Maria Marta Martin Max Mila Mona
Nadia Nils Nina Nora Olaf Olga Olive Omar Oscar Otto Paula Peter Petra Pia Rafael Ralph Rita Robin Rosa Ruben Ruth Sami Sara
Sofia Stella Sven Tara Tess Theo Tilda Tobias Tom Ulla Uma Ursula Vera Victor Viola Wanda Walter Willa Yara Yusuf Zelda Zoe""".split()

_SURNAME_HEADS = """Ash Beck Birch Black Bright Brook Clay Cold Cross Dale Elder Fair Fern Fox Frost Gold Gray Hart Hawk
Hazel Hill Holm Hunt Lake Lark Long Marsh Mill Moor North Oak Pike Reed Rose Sand Silver Stone Storm Swan Thorn Wells West White
Wild Winter Wood Wren""".split()
_SURNAME_TAILS = "bury by croft den dale field ford gate ham land ley low man more ridge shaw side son ton wall ward water well wick wood worth".split()
SURNAMES = [h + t for h in _SURNAME_HEADS for t in _SURNAME_TAILS if not t.startswith(h.lower()[-2:])]

_TOWN_HEADS = """Aber Alder Arn Bal Bar Bran Brem Cal Car Dor Dun Ever Fal Gal Gar Hal Har Inver Kel Kil Kin Lan Lin Lor Mal Mar
Mel Nor Or Pel Pen Ral Ros Sal Sel Tal Tar Tor Val Ver Wes Wil Win Yar""".split()
_TOWN_TAILS = "bach beck bridge burgh by castle combe dean dorf fell gard haven heim holt mere mouth nes port ness stad stow thorpe ville wich".split()
TOWNS = [h + t for h in _TOWN_HEADS for t in _TOWN_TAILS]

COLOURS = "red blue green yellow black white brown grey pink purple orange silver golden".split()
SIZES = "small large tiny huge little big".split()
MATERIALS = "wooden iron glass paper woollen leather copper clay silk stone".split()
QUALITIES = "old new heavy light broken clean dusty bright plain round square soft sharp cheap rare".split()

CATEGORIES: dict[str, list[str]] = {
    "fruit": "apple pear plum cherry grape lemon peach melon banana mango fig date berry lime apricot".split(),
    "vegetable": "carrot potato onion cabbage bean pea turnip leek pumpkin cucumber radish beet garlic tomato".split(),
    "animal": "dog cat horse cow goat sheep pig hen duck goose rabbit mouse donkey fox wolf bear deer owl crow frog".split(),
    "tool": "hammer saw axe drill spade rake knife brush ladder rope needle bucket wrench shovel chisel".split(),
    "instrument": "violin piano flute drum guitar harp trumpet cello horn organ fiddle bell".split(),
    "furniture": "table chair bed desk shelf bench sofa lamp mirror cupboard stool carpet curtain chest".split(),
    "clothing": "coat hat scarf shirt glove boot shoe dress sock belt jacket apron cap gown".split(),
    "vehicle": "cart wagon boat ship train bus car truck bicycle tram ferry sled".split(),
    "drink": "tea coffee milk juice cider water wine beer cocoa lemonade".split(),
    "dish": "soup stew bread pie cake salad pancake omelette noodle dumpling pudding sandwich".split(),
    "flower": "rose lily tulip daisy violet poppy iris orchid lavender sunflower".split(),
    "metal": "iron copper silver gold tin lead zinc nickel".split(),
}  # fmt: skip
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
THINGS = [
    w for c in ("fruit", "tool", "instrument", "furniture", "clothing", "flower") for w in CATEGORIES[c]
]
THINGS += "book letter map coin ring key clock candle basket bottle box bag cup plate kettle vase picture stamp pen doll kite ball".split()
ANIMALS = CATEGORIES["animal"]

JOBS = """baker butcher farmer teacher tailor painter carpenter smith sailor fisher miller gardener cook driver guard
clerk weaver potter shepherd hunter barber porter printer plumber mason singer dancer writer judge mayor librarian
postman innkeeper watchmaker beekeeper cobbler glazier brewer""".split()
ROOMS = "kitchen cellar attic garden hall parlour bedroom stable barn workshop pantry library study yard balcony".split()
SITES = "market harbour station school church mill bridge park museum theatre castle tower square inn bakery forest beach".split()
HOBBIES = """singing swimming reading fishing hiking dancing sewing cycling painting baking chess rowing skating running
gardening climbing carving weaving sketching sailing""".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
REGIONS = "the northern hills,the southern coast,the eastern plain,the western valley,the lake country,the high moor".split(
    ","
)
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
LETTERS = list("abcdefghijklmnopqrstuvwxyz")

OPPOSITES = [tuple(p.split(":")) for p in """hot:cold big:small tall:short old:young fast:slow rich:poor happy:sad early:late
open:closed full:empty wet:dry hard:soft heavy:light loud:quiet clean:dirty deep:shallow thick:thin near:far high:low strong:weak
sharp:blunt sweet:sour bright:dark rough:smooth wide:narrow safe:dangerous cheap:expensive simple:complex brave:timid
kind:cruel polite:rude calm:nervous wise:foolish lazy:busy tight:loose raw:cooked true:false first:last left:right up:down
day:night summer:winter friend:enemy win:lose buy:sell give:take push:pull start:stop laugh:cry remember:forget love:hate
arrive:leave rise:fall begin:end find:lose build:destroy""".split()]  # fmt: skip
SYNONYMS = [tuple(p.split(":")) for p in """big:large small:little fast:quick happy:glad old:ancient begin:start end:finish
buy:purchase help:assist ask:inquire show:reveal fix:repair choose:select keep:retain get:receive rich:wealthy quiet:silent
brave:bold angry:furious tired:weary strange:odd shop:store road:street house:home stone:rock forest:wood child:kid
boat:vessel gift:present picture:image job:occupation meal:dinner road:lane hill:mound""".split()]  # fmt: skip
PLURALS = {w: w + "s" for w in THINGS + ANIMALS} | {
    "berry": "berries", "cherry": "cherries", "peach": "peaches", "brush": "brushes", "bench": "benches", "box": "boxes",
    "violin": "violins", "dress": "dresses", "lily": "lilies", "daisy": "daisies", "poppy": "poppies", "mouse": "mice",
    "goose": "geese", "sheep": "sheep", "deer": "deer", "fox": "foxes", "wolf": "wolves", "shelf": "shelves", "scarf": "scarves",
    "knife": "knives", "mango": "mangoes", "iris": "irises", "wrench": "wrenches", "axe": "axes", "grape": "grapes",
}  # fmt: skip

# Short made-up label words: few-shot blocks give them a fresh meaning in every block, so no meaning can be memorised.
LABEL_PARTS = (
    "b d f g k l m n p r s t v z".split(),
    "a e i o u".split(),
    "b d g k l m n p r s t x z".split(),
)
LABEL_WORDS = [a + b + c for a in LABEL_PARTS[0] for b in LABEL_PARTS[1] for c in LABEL_PARTS[2]]
LABEL_WORDS += (
    LETTERS
    + COLOURS
    + NUMBERS
    + "yes no true false left right up down north south alpha beta gamma delta".split()
    + [*THINGS, *JOBS, *SITES, *ROOMS]
)


def article(word: str) -> str:
    """`an apple`, `a pear`: the word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def join_words(words: list[str], *, last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
