"""Words, names and keys that made texts and needles consist of, drawn from small lists of plain English."""

from __future__ import annotations

import uuid
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able agile airy alert amber ample ancient angular arched arctic ashen austere autumn bald balmy bare barren
    basic beaming bitter blank bleak blithe blond blue blunt bold bony bouncy brave breezy brief bright brisk
    brittle broad broken bronze brown bumpy busy calm candid careful chalky charming cheap cheerful chilly choppy
    circular civil clean clear clever cloudy clumsy coarse coastal cold common compact cool copper coral cosy
    cracked crimson crisp crooked crude cubic curious curly curved dainty damp dapper dark dashing deep dense
    dented devoted dim distant dizzy dotted double drafty dreamy dry dull dusky dusty eager early earnest eastern
    elastic elegant empty enormous even exact exotic faded faint fair faithful famous fancy fast fearless feeble
    fierce fiery final fine firm fixed flat fleecy flinty floral foamy fond formal fragile frank free fresh
    friendly frosty frozen full funny fuzzy gaunt gentle giant gilded glad glassy gleaming global gloomy glossy
    golden good grainy grand grassy grateful gray great green gritty hairy handy happy hardy hasty hazy heavy
    hidden high hollow honest humble humid hungry hushed icy idle ivory jagged jolly joyful jumbo keen kind
    knotted large late lavish lazy leafy lean level light limber little lively local lofty lonely long loose loud
    loyal lucky lunar lush magnetic major marble mellow merry messy mighty mild milky minor misty mobile modern
    modest moist mossy muddy muffled murky musical mute narrow native neat neutral new nimble noble noisy northern
    novel oaken oblong oily olive open orange orderly ornate outer oval pale paper patient peaceful pearly pebbled
    perfect pink plain playful plump polar polished polite prickly prime private prompt proud pure purple quaint
    quick quiet radiant rainy rapid rare raw ready regal remote restless rich rigid ripe robust rocky rosy rough
    round royal ruddy rugged rural russet rustic rusty sacred salty sandy scarlet secret serene shady shallow
    sharp shiny short shy silent silky silver simple sleek sleepy slender slim slow small smart smoky smooth snowy
    sober soft solar solemn solid southern spare sparse spicy spotted square stable starry stately steady steep
    stern sticky still stony stormy strict striped strong sturdy subtle sunny supple sweet swift tall tame tangled
    tart tawny tender tepid thick thin thirsty thorny tidy timid tiny tough tranquil trim true twin unusual upper
    urban useful vague vain valiant vast velvet verdant violet vivid walled warm wary watchful wavy weary western
    wet white wide wild willing windy winter wise wiry witty wooden woolly worn yellow young zesty
    """
)
NOUNS = _words(
    """
    acorn acre adder almond alpaca anchor ankle ant antler anvil apple apron arch armchair arrow ash aspen atlas
    attic avenue awning axle badge badger bakery balcony ball bamboo banjo bank banner barge bark barley barn
    barrel basin basket bat bay beach beacon bead beagle beak beam bean bear beaver beech beehive beetle bell
    bench berry birch biscuit bison blade blanket blossom boat bobbin bolt bonnet book boot border bottle boulder
    bow bowl bracket brake branch bread brick bridge bridle broom brook brush bucket buckle buffalo bugle bush
    butter button cabbage cabin cable cactus camel camera canal candle canoe canvas canyon cape caravan cargo
    carpet carrot cart castle cat cave cedar cellar chain chair chalk channel chapel cheese cherry chest chestnut
    chimney chisel cider cinder circle clam clay cliff cloak clock cloth cloud clover coach coal coast cobble
    cocoa coin collar comet compass cone copse cord cork corn corner cottage cotton couch cove crab cradle crane
    crate crayon creek cricket crow crown crystal cup curtain cushion cypress daisy dam deer delta desert desk
    dish dock dolphin dome donkey door dove dragon drawer drum duck dune eagle easel echo eel elbow elk elm ember
    engine envelope estate falcon fan farm feather fence fern ferry fiddle field fig finch fir flag flame flask
    flint flock floor flute forest forge fork fort fossil fountain fox frame frog furnace gallery gander garden
    garlic gate gazelle gear geyser ginger glacier glade glass globe glove goat goose gorge grain granite grape
    grass gravel grove guitar gull hammer hammock harbor hare harness harp hat hatch hawk hazel heather hedge
    helmet hen heron hill hinge hive holly honey hood hoof hook horn horse hotel hound house hut iceberg inlet inn
    iris iron island ivy jacket jade jar jasmine jay jetty jewel jug jungle juniper kayak kennel kernel kettle key
    kiln kitchen kite kitten knee knot koala lace ladder ladle lagoon lake lamb lamp lane lantern larch lark
    lather lawn leaf leather ledge lemon lens lentil library lichen lid lily lime linen lion lizard llama lobster
    locket locust log loom lotus lynx magnet magpie mallet mango mantle map maple mare marsh mask mast meadow
    medal melon mill mint mirror mitten moat mole monkey moor moose moss moth motor mountain mouse mug mule
    mushroom mussel nail napkin needle nest net nettle newt nickel nook notebook nut oak oar oasis oat ocean olive
    onion opal orchard orchid organ otter oven owl ox oyster paddle page pail palace palm pan panda panel panther
    parcel park parrot parsnip path pea peach peacock peanut pear pebble pelican pen pencil pepper perch piano
    pickle pier pigeon pillar pillow pilot pine pipe planet plank plate plateau plow plum pocket pond pony poplar
    poppy porch port potato prairie prism puddle puffin pulley pump pumpkin puppet puzzle quail quarry quartz quay
    quill quilt rabbit raccoon radish raft railing rake ram ranch raven reed reef ribbon ridge ring river road
    robin rocket rod roof rook root rope rose rudder rug saddle sail salmon sapling satchel saucer saw scarf
    school scooter seal seed shed sheep shelf shell shelter ship shirt shoe shore shovel shrimp shrub shutter silo
    skate sky slate sled sleeve slipper slope snail snow socket sofa spade sparrow spear spider spinach spindle
    spire sponge spoon spring spruce squirrel stable stair stamp star statue steam steel stem stone stork stove
    stream street string summit swallow swan table tailor tapestry tavern tea teapot temple tent terrace thicket
    thimble thistle thorn thread throne thrush tiger tile timber toad tomato torch tortoise tower trail train tray
    tree trellis trout trowel trumpet trunk tulip tunnel turnip turtle umbrella valley vase vault veil vest
    viaduct village vine violin wagon wall walnut walrus warehouse wasp water wave weasel weaver well whale wharf
    wheat wheel whistle willow window wing winter wolf wood wool workshop wren yacht yard yarn yew zebra
    """
)
_ONSETS = _words("b br c cl d dr f fl g gr h j k l m n p pr qu r s st t th tr v w")
_VOWELS = _words("a e i o u ai ea ou")
_ENDS = _words("bury den dale field ford ham ley mere ton wick worth mouth stead gate shaw")
_NAME_ENDS = _words("la n ra s th da lo mir na rin ric sa ta vin")


def draw_keys(chance: Random, count: int, taken: frozenset[str] = frozenset()) -> list[str]:
    """Return `count` different keys of two words, `quiet-otter`, none of them in `taken`; all of them are there once.

    No list of all pairs is made: pairs are drawn by number.
    """
    keys: dict[str, None] = {}
    for number in chance.sample(range(len(ADJECTIVES) * len(NOUNS)), count + len(taken)):
        key = pair(number)
        if key not in taken and len(keys) < count:
            keys[key] = None
    return list(keys)


def pair(number: int) -> str:
    """Return the key of two words with this number; there are `len(ADJECTIVES) * len(NOUNS)`."""
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


def draw_uuid(chance: Random) -> str:
    """Return a random UUID (version 4) that follows from `chance` alone."""
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def town_name(chance: Random) -> str:
    """Return a made name of a town."""
    return f"{_syllable(chance)}{chance.choice(_ENDS)}".capitalize()


def person_name(chance: Random) -> str:
    """Return a made first and family name."""
    first = f"{_syllable(chance)}{chance.choice(_NAME_ENDS)}".capitalize()
    return f"{first} {_syllable(chance).capitalize()}{_syllable(chance)}{chance.choice(_NAME_ENDS)}"


def _syllable(chance: Random) -> str:
    return chance.choice(_ONSETS) + chance.choice(_VOWELS) + chance.choice("lmnrst")
