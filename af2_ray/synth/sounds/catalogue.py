"""Which file of which package is a recording of what: the one table to edit when a class is added.

A class is worth having when it sounds unlike the others and when there are enough recordings of it to hold some back:
a small encoder trained from scratch must know it again on recordings that it never heard. Classes are listed in
order of preference; a corpus takes the first `num_classes` that have enough distinct recordings. Shaker and snare stand
before water and door because a classifier on log-mel statistics, trained and tested on training clips of unlike groups,
knows sixteen classes with them better than with those (0.81 against 0.76; door alone 0.57).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SoundClass:
    """One class of sounds: its name, its two noun phrases, where its recordings are.

    Attributes:
        label: answer of questions, lower case.
        phrases: the canonical noun phrase and a paraphrase, each with its article.
        musical: True where a music bed could be mistaken for it: it then never sounds over one.
        files: (package, regular expression over the path inside the package).
        programs: General MIDI programs (0-127) rendered from the sound font; each program is one group.
        drums: General MIDI percussion keys, rendered from every drum kit of the sound font.
    """

    label: str
    phrases: tuple[str, str]
    musical: bool
    files: tuple[tuple[str, str], ...] = ()
    programs: tuple[int, ...] = ()
    drums: tuple[int, ...] = ()
    register: tuple[int, int] = (48, 79)


LMMS, SONIC, SCRATCH, HYDROGEN = "lmms-common", "sonic-pi-samples", "scratch", "hydrogen-data"
MINETEST, TUX, GCOMPRIS, DESKTOP = (
    "minetest-data",
    "tuxpaint-stamps-default",
    "gcompris-qt-data",
    "sound-theme-freedesktop",
)

CLASSES: tuple[SoundClass, ...] = (
    SoundClass(
        "speech", ("a voice", "a person speaking"), musical=False, files=((TUX, r"symbols/math/\d_[a-zA-Z_]+\.ogg$"),)
    ),
    SoundClass(
        "drum",
        ("a drum", "a bass drum"),
        musical=True,
        files=(
            (HYDROGEN, r"_?Kick"),
            (LMMS, r"drums/(bassdrum|kick)"),
            (SONIC, r"/(bd_|drum_(bass|heavy)|elec_(hollow|soft)_kick)"),
        ),
        drums=(35, 36),
    ),
    SoundClass(
        "cymbal",
        ("a cymbal", "a crashing cymbal"),
        musical=True,
        files=(
            (HYDROGEN, r"/(Crash|Ride|24Ride|Splash|808_Cymbal)"),
            (LMMS, r"drums/(crash|ride)"),
            (SONIC, r"/(drum_(cymbal_(hard|open|soft)|splash)|elec_cymbal)"),
            (SCRATCH, r"/(CymbalCrash|RideCymbal)"),
            (GCOMPRIS, r"/cymbal\.ogg"),
            (TUX, r"cymbal_crash\.ogg"),
        ),
        drums=(49, 51, 52, 55, 57, 59),
    ),
    SoundClass(
        "flute",
        ("a flute", "flute notes"),
        musical=True,
        files=((LMMS, r"instruments/flute"), (GCOMPRIS, r"/flute_traversiere\.ogg")),
        programs=(72, 73, 74, 75),
        register=(67, 91),
    ),
    SoundClass(
        "bass",
        ("a bass", "bass notes"),
        musical=True,
        files=((LMMS, r"basses/bass"),),
        programs=(32, 33, 34, 35, 36, 37),
        register=(28, 43),
    ),
    SoundClass(
        "applause",
        ("applause", "a clapping crowd"),
        musical=False,
        files=((GCOMPRIS, r"LRApplau"), (LMMS, r"applause|raving")),
        programs=(126,),
    ),
    SoundClass(
        "clap",
        ("a clap", "clapping hands"),
        musical=False,
        files=(
            (HYDROGEN, r"Clap"),
            (LMMS, r"drums/clap|misc/snaph"),
            (SCRATCH, r"/(HandClap|FingerSnap)"),
            (SONIC, r"perc_snap"),
        ),
        drums=(39,),
    ),
    SoundClass("tabla", ("a tabla", "tabla strokes"), musical=False, files=((SONIC, r"/tabla_"),)),
    SoundClass(
        "xylophone",
        ("a xylophone", "wooden bars"),
        musical=False,
        files=((GCOMPRIS, r"/xylofon_son\d"), (SCRATCH, r"/[Xx]ylo\d")),
        programs=(12, 13),
        register=(60, 91),
    ),
    SoundClass(
        "violin",
        ("a violin", "bowed strings"),
        musical=True,
        files=(
            (LMMS, r"instruments/(cello|violin_(double|fing))|strings01"),
            (GCOMPRIS, r"/(violin|cello)\.ogg"),
            (TUX, r"string/(cello|violin)\.ogg"),
        ),
        programs=(40, 41, 42, 48, 49, 44),
    ),
    SoundClass(
        "footsteps",
        ("footsteps", "a walking person"),
        musical=False,
        files=((MINETEST, r"(?<!water)_footstep"), (SCRATCH, r"/Footsteps"), (GCOMPRIS, r"icy_walk")),
    ),
    SoundClass(
        "cowbell",
        ("a cowbell", "a struck cowbell"),
        musical=False,
        files=(
            (HYDROGEN, r"/(808_)?(Cowbell|Clave)|SideStick"),
            (LMMS, r"drums/(clav|wood)"),
            (SONIC, r"drum_cowbell|elec_wood"),
        ),
        drums=(56, 67, 68, 75, 76, 77),
    ),
    SoundClass(
        "tom",
        ("a tom", "tom drums"),
        musical=True,
        files=(
            (HYDROGEN, r"/(808_)?Tom"),
            (LMMS, r"drums/tom"),
            (SONIC, r"/drum_tom"),
            (TUX, r"tomtom"),
            (GCOMPRIS, r"/(timpani|bongo)\.ogg"),
        ),
        drums=(41, 45, 48),
    ),
    SoundClass(
        "piano",
        ("a piano", "piano notes"),
        musical=True,
        files=((LMMS, r"instruments/(e_piano_accord|piano)\d+"), (GCOMPRIS, r"instruments/.*/piano\.ogg")),
        programs=(0, 1, 2, 3),
    ),
    SoundClass(
        "shaker",
        ("a shaker", "a shaken rattle"),
        musical=False,
        files=((LMMS, r"drums/shaker"), (SCRATCH, r"/(Shaker|Rattle)"), (GCOMPRIS, r"/(maracas|tambourine)\.ogg")),
        drums=(54, 69, 70, 82),
    ),
    SoundClass(
        "snare",
        ("a snare drum", "a rattling snare"),
        musical=True,
        files=(
            (HYDROGEN, r"/(808_)?Snare[-_]"),
            (LMMS, r"drums/(snare|nasty_snare)"),
            (SONIC, r"/(sn_|drum_snare|elec_(filt|hi|lo|mid)?_?snare)"),
            (GCOMPRIS, r"/snare_drum\.ogg"),
        ),
        drums=(38, 40),
    ),
    SoundClass(
        "water",
        ("water", "splashing water"),
        musical=False,
        files=(
            (MINETEST, r"env_sounds_water|water_footstep"),
            (GCOMPRIS, r"/(water|water_fill|apert|drip|bubble)\.wav"),
            (SCRATCH, r"/(WaterRunning|WaterDrop|Bubbles|Ripples|Plunge)"),
            (TUX, r"toilet\.ogg"),
        ),
    ),
    SoundClass(
        "door",
        ("a door", "a closing door"),
        musical=False,
        files=(
            (MINETEST, r"door_(close|open)|chest|fencegate"),
            (SCRATCH, r"/Door"),
            (GCOMPRIS, r"/(door_(open|close)\.wav|LRDoor.*)"),
            (SONIC, r"perc_door"),
        ),
    ),
    SoundClass(
        "hi-hat",
        ("a hi-hat", "a ticking hi-hat"),
        musical=True,
        files=((HYDROGEN, r"/(808_)?Hat"), (LMMS, r"drums/hihat"), (SONIC, r"drum_cymbal_(closed|pedal)")),
        drums=(42, 44, 46),
    ),
    SoundClass(
        "trumpet",
        ("a trumpet", "brass notes"),
        musical=True,
        files=(
            (LMMS, r"instruments/trumpet|latin_brass"),
            (GCOMPRIS, r"/(trumpet|trombone|horn|tuba)\.ogg"),
            (SCRATCH, r"/Trumpet\d"),
        ),
        programs=(56, 57, 59, 61),
    ),
    SoundClass(
        "choir",
        ("a choir", "singing voices"),
        musical=True,
        files=((SONIC, r"ambi_choir"), (LMMS, r"choir01|chorus0"), (SCRATCH, r"/Singer\d")),
        programs=(52, 53),
    ),
    SoundClass(
        "dog",
        ("a dog", "a barking dog"),
        musical=False,
        files=((SCRATCH, r"/Dog\d"), (GCOMPRIS, r"/(dog|LRBark.*)\.ogg"), (TUX, r"dogs/(dog|fox)\.ogg")),
    ),
    SoundClass(
        "duck",
        ("a duck", "a quacking duck"),
        musical=False,
        files=((SCRATCH, r"/(Duck|Goose)"), (GCOMPRIS, r"/duck\.ogg"), (TUX, r"birds/(drake|duck|gander)\.ogg")),
    ),
    SoundClass(
        "organ",
        ("an organ", "organ notes"),
        musical=True,
        files=((LMMS, r"instruments/(church|e)_organ"), (GCOMPRIS, r"/(organ|accordion|harmonica)\.ogg")),
        programs=(16, 17, 18, 19),
    ),
    SoundClass("harp", ("a harp", "harp strings"), musical=True, files=((GCOMPRIS, r"/harp\.ogg"),), programs=(46,)),
    SoundClass(
        "electric guitar",
        ("an electric guitar", "a distorted guitar"),
        musical=True,
        files=(
            (LMMS, r"steel_guitar_.*distorted"),
            (GCOMPRIS, r"/electric_guitar\.ogg"),
            (SONIC, r"/guit_e_(fifths|slide)"),
        ),
        programs=(29, 30),
    ),
    SoundClass(
        "bell",
        ("a bell", "a ringing bell"),
        musical=True,
        files=(
            (LMMS, r"misc/(metalish_)?dong|bell_choir|wind_chimes"),
            (SONIC, r"/(perc_bell|elec_bell|elec_chime)"),
            (SCRATCH, r"/(BellToll|Gong)"),
            (DESKTOP, r"/(bell|complete)\.oga"),
            (GCOMPRIS, r"/(triangle|LRBuddhist_gong.*)\.ogg"),
        ),
        programs=(9, 14),
        register=(67, 91),
    ),
    SoundClass(
        "guitar",
        ("a guitar", "guitar strings"),
        musical=True,
        files=(
            (GCOMPRIS, r"/(guitar|banjo|guitar_son\d)\.ogg"),
            (SCRATCH, r"/(GuitarStrum|AfroString)\.wav"),
            (LMMS, r"latin_guitar|steel_guitar01"),
            (SONIC, r"/guit_(em9|harmonics)"),
        ),
        programs=(24, 25, 26),
    ),
    SoundClass(
        "bird",
        ("a bird", "a singing bird"),
        musical=False,
        files=((SCRATCH, r"/Bird\."), (TUX, r"birds/(blackbird|lark|quetzal|cuckoo|seagull|tucan)\.ogg")),
        programs=(123,),
    ),
    SoundClass(
        "rooster",
        ("a rooster", "a crowing rooster"),
        musical=False,
        files=((SCRATCH, r"/Rooster"), (TUX, r"birds/(rooster|hen|turkey)\.ogg"), (GCOMPRIS, r"/chickens\.ogg")),
    ),
    SoundClass(
        "cat",
        ("a cat", "a meowing cat"),
        musical=False,
        files=((SCRATCH, r"/(Cat|Kitten|Meow)\."), (GCOMPRIS, r"/cat\.ogg"), (TUX, r"blackcat\.ogg")),
    ),
    SoundClass(
        "sheep",
        ("a sheep", "a bleating sheep"),
        musical=False,
        files=((TUX, r"bovines/(sheep|sheep_lamb|ram|goat|mountaingoat)\.ogg"), (GCOMPRIS, r"/sheep\.ogg")),
    ),
    SoundClass(
        "laser",
        ("a laser", "a zapping laser"),
        musical=False,
        files=((LMMS, r"drums/zap"), (SCRATCH, r"/(Laser|Zoop|Whoop)"), (SONIC, r"elec_(twip|blip)")),
    ),
    SoundClass(
        "explosion",
        ("an explosion", "a loud blast"),
        musical=False,
        files=(
            (MINETEST, r"tnt_explode"),
            (LMMS, r"explode"),
            (TUX, r"lightningbolt|fireworks"),
            (SONIC, r"cineboom"),
            (GCOMPRIS, r"LRFireballs|crash\.wav"),
        ),
        programs=(127,),
    ),
)

# (kind, package, regular expression): what may lie under the sounds. No ambience is the sound of a class.
BEDS: tuple[tuple[str, str, str], ...] = (
    ("music", "singularity-music", r"\.ogg$"),
    ("music", "asterisk-moh-opsound-wav", r"\.wav$"),
    ("ambience", SONIC, r"/ambi_(drone|dark_woosh|glass_hum|haunted_hum|lunar_land|sauna|soft_buzz|swoosh)"),
    ("ambience", SONIC, r"/(loop_3d_printer|loop_drone_g_97|vinyl_hiss)"),
    ("ambience", MINETEST, r"/(fire_large|fire_fire\.\d|env_sounds_lava\.\d|default_furnace_active)"),
    ("ambience", GCOMPRIS, r"/LRFrogs.*"),
    ("ambience", LMMS, r"/(nord_ambient|korg_poly6_drone|space_strings\d)"),
)
