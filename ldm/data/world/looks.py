"""What a look of the drawn world is made of: colours, ground, roadside things, hills and weather.

Colours are "#rrggbb"; lengths are metres, angles radians. Nothing here is random: a clip's seed only chooses among what
its look allows. The looks themselves are in `world_looks.py` and `world_looks_dreamt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Things:
    """Things of one kind beside the road: `per_100m` of them on each side, `near` to `far` metres from its middle.

    `near == far == 0` spans the road. `glow` 1 shines by itself, 0 takes the haze like everything else.
    """

    kind: str
    per_100m: float
    near: float
    far: float
    height: tuple[float, float]
    colours: tuple[str, str]
    glow: float = 0.0


@dataclass(frozen=True)
class Look:
    """One look of the world.

    phrases: what captions call it, the first is the one of the prompts. sky: zenith, horizon. haze: what the distance
    turns into, at `visible` metres wholly; `haze_power` below 1 is fog, 2 is clear air. ground: base, patches, specks.
    road: asphalt, marks, shoulder. hills: (kind, colour, height as an angle), far ones first. sun: (colour, height as
    an angle, radius as an angle). clouds: (colour, share of the sky). stars: how many. rail: what runs beside the road.
    sea: its colour, to the left of the road. weather: what falls or floats. night: cars have their lights on.
    banded_sun: the sun is cut into bands. aurora: the clouds are one.
    """

    name: str
    phrases: tuple[str, ...]
    sky: tuple[str, str]
    haze: str
    ground: tuple[str, str, str]
    pattern: str
    road: tuple[str, str, str]
    things: tuple[Things, ...]
    hills: tuple[tuple[str, str, float], ...]
    sun: tuple[str, float, float] | None = None
    clouds: tuple[str, float] | None = None
    stars: int = 0
    visible: float = 115.0
    haze_power: float = 1.6
    rail: tuple[str, str] | None = None
    sea: str | None = None
    weather: str | None = None
    night: bool = False
    banded_sun: bool = False
    aurora: bool = False


ASPHALT = ("#6a6a70", "#eeeadc", "#9b8f7a")  # with its marks and shoulder


DREAMT = (
    Look(
        "volcano fire", ("volcano fire burning", "burning volcano", "volcano eruption with fire"),
        sky=("#2a1114", "#c2411a"), haze="#5d2118", ground=("#2b2322", "#46302b", "#ff8a1e"), pattern="lava",
        road=("#33302f", "#c9a27a", "#4a3a33"),
        things=(
            Things("bare tree", 18, 6, 22, (5, 8), ("#1c1514", "#3a2a22")),
            Things("rock", 20, 4.8, 22, (0.8, 2.6), ("#54423d", "#2a2020")),
            Things("mound", 24, 6.5, 22, (3, 6.5), ("#4a302a", "#b8481c")),
            Things("flame", 15, 5.5, 26, (1.4, 3.6), ("#ffb52e", "#ff4a12"), 0.8),
            Things("tuft", 10.4, 4.6, 9, (0.4, 0.8), ("#6b3a22", "#d8641e")),
        ),
        hills=(("volcano", "#3a1a18", 0.19), ("hills", "#2a1716", 0.04)), clouds=("#5a2018", 0.35), visible=100,
        haze_power=1.4, weather="embers", night=True,
    ),
    Look(
        "cyberpunk", ("cyberpunk", "cyberpunk city", "neon cyberpunk night"),
        sky=("#0d0a26", "#5a1f6e"), haze="#3a1c56", ground=("#24203a", "#35305a", "#36e0e6"), pattern="paving",
        road=("#2b2a3c", "#7df9ff", "#3a3458"),
        things=(
            Things("tower", 5.5, 11, 24, (14, 36), ("#2a2850", "#ff3fa4"), 0.3),
            Things("neon sign", 9.1, 5.6, 8, (4, 6.5), ("#ff2fa8", "#2ff3ff"), 0.9),
            Things("lamp", 3.9, 75, 5.2, (5.5, 6.5), ("#50506e", "#9ff6ff"), 0.7),
            Things("gantry", 1.2, 0, 0, (7, 8), ("#3b3a5e", "#ffd23f"), 0.7),
            Things("barrel", 7.8, 4.7, 7, (0.9, 1.2), ("#4a4674", "#ff5f3f")),
        ),
        hills=(("skyline", "#3d2a6e", 0.22), ("skyline", "#241a48", 0.13)), stars=40, visible=90, haze_power=1.5,
        rail=("rail", "#4fd8e8"), night=True,
    ),
    Look(
        "mars", ("mars", "red planet mars", "martian"),
        sky=("#a8704e", "#e0b48c"), haze="#d49a70", ground=("#a8502e", "#8a3c22", "#d88a5a"), pattern="scree",
        road=("#7c4a38", "#e8c8a0", "#8f4c30"),
        things=(
            Things("rock", 26, 4.7, 30, (0.5, 3), ("#b4603a", "#6c2e1c")),
            Things("rock", 14, 9, 30, (3, 6), ("#a45230", "#602a1a")),
            Things("dome", 3, 11, 22, (4, 6), ("#e8e4e0", "#6cc0d8")),
            Things("snow pole", 3.9, 4.5, 4.6, (1.8, 2), ("#f0f0f0", "#ff8a3a")),
        ),
        hills=(("mesas", "#b86a44", 0.086), ("dunes", "#a4562f", 0.036)), sun=("#fff4e4", 0.26, 0.022), visible=120,
        haze_power=1.7,
    ),
    Look(
        "pastel painting", ("pastel painting", "soft pastel drawing", "dreamy pastel"),
        sky=("#b8c8f0", "#fbdde6"), haze="#f4dce6", ground=("#bfe0b4", "#f4d8b8", "#f6b4c8"), pattern="grass",
        road=("#b8b0c8", "#fffaf0", "#e4d0c8"),
        things=(
            Things("tree", 11.7, 6.5, 28, (5, 9), ("#f0b0c8", "#b08c98")),
            Things("tree", 9.1, 7, 28, (4, 8), ("#a4d4c0", "#a8907c")),
            Things("bush", 15.6, 4.7, 13, (0.7, 1.6), ("#c8b4e8", "#f0c8d8")),
            Things("house", 2.3, 11, 22, (4, 6), ("#fbe8c8", "#e89a9a")),
        ),
        hills=(("hills", "#c8b8e4", 0.086), ("hills", "#b4dcc8", 0.043)), sun=("#fff8d8", 0.24, 0.05),
        clouds=("#ffffff", 0.5), visible=120, haze_power=1.5,
    ),
    Look(
        "moonlit lavender", ("moonlit lavender", "lavender fields by moonlight", "lavender under the moon"),
        sky=("#1a1a4a", "#6a5a9c"), haze="#54488a", ground=("#5a4a8c", "#8a68c8", "#c8a4f0"), pattern="rows",
        road=("#4a4660", "#e0dcf0", "#5c5478"),
        things=(
            Things("lavender", 38, 4.7, 12, (0.7, 1), ("#9a74d8", "#4c6a5c")),
            Things("cypress", 24, 6, 26, (6, 10), ("#2a4450", "#2c2430")),
            Things("house", 1.2, 12, 24, (4, 6), ("#8a80a4", "#ffd890"), 0.2),
            Things("bush", 20, 5, 14, (0.7, 1.4), ("#5a6a84", "#8a7ab8")),
        ),
        hills=(("hills", "#3c3670", 0.079), ("hills", "#4a3c78", 0.036)), sun=("#fdf6e0", 0.26, 0.045), stars=30,
        visible=110, night=True,
    ),
    Look(
        "crystal planet", ("crystal planet", "alien planet with crystals", "strange alien world"),
        sky=("#10243c", "#2c8c8c"), haze="#2a6c78", ground=("#2c4c5c", "#3c3470", "#7cf4d8"), pattern="scree",
        road=("#3c4458", "#9cf4e8", "#344c60"),
        things=(
            Things("crystal", 28, 5, 28, (1.5, 7), ("#58e0d8", "#a05ce8"), 0.4),
            Things("rock", 18, 4.7, 20, (0.5, 2), ("#4c6478", "#2c3448")),
            Things("mushroom", 16, 5.5, 20, (1.2, 3.5), ("#d85cc0", "#a8c8d8"), 0.3),
        ),
        hills=(("mountains", "#1f5468", 0.115), ("mountains", "#223c58", 0.058)), sun=("#e8a4ff", 0.28, 0.08),
        stars=40, visible=110, haze_power=1.5, night=True,
    ),
    Look(
        "enchanted forest", ("enchanted forest", "magic fairy tale forest", "glowing magic wood"),
        sky=("#141c3c", "#2c5a5c"), haze="#26504e", ground=("#2c4c38", "#3c6444", "#8cf0a8"), pattern="grass",
        road=("#48485c", "#d0e8d0", "#3c4c48"),
        things=(
            Things("tree", 15.6, 6.5, 26, (7, 12), ("#2f6c5c", "#3c2c3c")),
            Things("mushroom", 15.6, 4.7, 14, (0.7, 2), ("#e85c74", "#e8e0d0"), 0.5),
            Things("fern", 13, 4.6, 10, (0.7, 1.4), ("#3c8c6c", "#74c88c")),
            Things("lantern", 3.9, 4.9, 5.2, (2.4, 2.8), ("#54485c", "#fff0a0"), 0.7),
        ),
        hills=(("hills", "#1f4448", 0.094), ("hills", "#183a38", 0.058)), sun=("#e8f4ff", 0.3, 0.05), stars=90,
        visible=80, haze_power=1.4, weather="fireflies", night=True,
    ),
    Look(
        "coral reef", ("underwater coral reef", "coral reef under the sea", "deep sea"),
        sky=("#0a4c8c", "#2ca4bc"), haze="#2490ac", ground=("#5cb0a4", "#c8b884", "#f48c8c"), pattern="sand",
        road=("#5c8494", "#d8f4e8", "#7cac9c"),
        things=(
            Things("coral", 18.2, 4.8, 20, (0.9, 3), ("#f4746c", "#f4b04c")),
            Things("kelp", 14.3, 5.5, 26, (4, 9), ("#3c8c54", "#74ac4c")),
            Things("rock", 10.4, 4.8, 22, (0.7, 2.6), ("#6c8c94", "#3c5468")),
            Things("coral", 11.7, 4.8, 20, (0.7, 2), ("#b46cd8", "#f49cc8")),
        ),
        hills=(("hills", "#1c84a4", 0.094), ("hills", "#1a7494", 0.05)), visible=75, haze_power=1.0,
        weather="bubbles",
    ),
    Look(
        "arctic aurora", ("arctic aurora", "northern lights over ice", "polar night with aurora"),
        sky=("#081428", "#1c4c5c"), haze="#1f4454", ground=("#a4bcd4", "#6c8cb0", "#dcecf8"), pattern="snow",
        road=("#4c5a6c", "#dce8f0", "#84a0bc"),
        things=(
            Things("crystal", 16, 5.2, 26, (1, 4.5), ("#a4dcf4", "#5c8cc8")),
            Things("snowy pine", 28, 6.5, 28, (4, 8), ("#2c4c58", "#c4d8e8")),
            Things("rock", 13, 4.8, 18, (0.5, 1.8), ("#8ca4bc", "#54687c")),
            Things("snow pole", 6.5, 4.4, 4.5, (1.6, 1.8), ("#e8583c", "#e8f0f4")),
        ),
        hills=(("snow mountains", "#34506c", 0.108), ("hills", "#54748c", 0.036)), clouds=("#3cf0a4", 0.45), stars=60,
        visible=110, night=True,
        aurora=True,
    ),
    Look(
        "synthwave", ("synthwave", "retro synthwave sunset", "neon grid synthwave"),
        sky=("#180a3c", "#f0448c"), haze="#8c2878", ground=("#1c1040", "#341a68", "#ff4cd8"), pattern="grid",
        road=("#241a3c", "#ff6ce0", "#3c1f68"),
        things=(
            Things("palm", 11.7, 6, 22, (5, 9), ("#3c1c74", "#f04cc0")),
            Things("crystal", 10.4, 6, 26, (1.5, 5), ("#4c2c9c", "#38e8f8"), 0.3),
            Things("lamp", 5.2, 75, 5.1, (4, 5), ("#5c3c94", "#ffb45c"), 0.7),
        ),
        hills=(("mountains", "#4c1f7c", 0.094), ("mountains", "#2c1458", 0.05)), sun=("#ffd048", 0.13, 0.14),
        stars=90, haze_power=1.7, rail=("rail", "#f45cd0"), night=True,
        banded_sun=True,
    ),
    Look(
        "candy land", ("candy land", "land of sweets", "sugar candy world"),
        sky=("#8cd8f4", "#ffd8ec"), haze="#ffd4e8", ground=("#a4ecc8", "#f8b8dc", "#fff48c"), pattern="paving",
        road=("#e0a4c8", "#ffffff", "#f8e0b4"),
        things=(
            Things("lollipop", 15.6, 5, 24, (2, 5), ("#f45c94", "#ffffff")),
            Things("cane", 10.4, 4.8, 20, (1.8, 3.6), ("#f04c4c", "#ffffff")),
            Things("bush", 13, 4.8, 14, (0.8, 1.8), ("#b48cf0", "#f8c8f0")),
            Things("tree", 6.5, 7, 26, (4, 7), ("#8ce4dc", "#c88c64")),
        ),
        hills=(("hills", "#f4b4d8", 0.086), ("hills", "#b4e4c0", 0.043)), sun=("#fff8b4", 0.28, 0.05),
        clouds=("#ffffff", 0.5), visible=120, haze_power=1.7,
    ),
)  # fmt: skip


_OF_THE_EARTH = (
    Look(
        "summer dawn", ("summer dawn", "summer sunrise", "early summer morning"),
        sky=("#5d7fc4", "#ffc489"), haze="#f3c39a", ground=("#6f8a3f", "#93a04c", "#f0dc6a"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("tree", 11.7, 7, 30, (5, 9), ("#47702f", "#5b4030")),
            Things("bush", 15.6, 4.8, 14, (0.8, 1.8), ("#5f8534", "#8a9c3c")),
            Things("pole", 3.2, 5, 5.4, (6, 7), ("#6a5340", "#8a7358")),
            Things("tuft", 20.8, 4.6, 9, (0.5, 0.9), ("#9aa850", "#d8c860")),
        ),
        hills=(("hills", "#b48a8c", 0.079), ("hills", "#7f8a6a", 0.043)), sun=("#fff3c8", 0.1, 0.05),
        clouds=("#ffd9b8", 0.35),
    ),
    Look(
        "snow", ("snow", "snowy winter", "snow covered winter"),
        sky=("#a9bdd4", "#e6ebf0"), haze="#dde4ec", ground=("#e4eaf2", "#b9c6d8", "#8c98a8"), pattern="snow",
        road=("#8d929c", "#f4f4ee", "#cfd6e0"),
        things=(
            Things("snowy pine", 18.2, 6.5, 32, (4, 9), ("#3f5c50", "#f2f6fa")),
            Things("bare tree", 5.2, 6, 24, (4, 6), ("#5a4c46", "#86786e")),
            Things("rock", 7.8, 4.8, 16, (0.5, 1.4), ("#a6b0bc", "#6c7884")),
            Things("snow pole", 6.5, 4.4, 4.5, (1.6, 1.8), ("#d8402c", "#f4f0e8")),
        ),
        hills=(("mountains", "#b4c2d4", 0.108), ("hills", "#c8d2de", 0.043)), clouds=("#f4f6f8", 0.4), visible=100,
        haze_power=1.2, weather="snow",
    ),
    Look(
        "desert", ("desert", "sandy desert", "hot dry desert"),
        sky=("#4a90d0", "#f2dcae"), haze="#ecd3a4", ground=("#d8ac68", "#c08a4a", "#8e7a3e"), pattern="sand",
        road=("#7d746a", "#f2e6c0", "#c9a468"),
        things=(
            Things("cactus", 14, 5.5, 26, (2.5, 5), ("#4f7a3e", "#3a5c30")),
            Things("rock", 16, 4.8, 30, (0.6, 2.4), ("#b8824c", "#7c5230")),
            Things("bush", 14.3, 4.6, 18, (0.5, 1.1), ("#8d8a4a", "#a89a58")),
            Things("pole", 2.9, 6, 6.4, (6, 7), ("#7c6248", "#5a4432")),
        ),
        hills=(("mesas", "#c88a64", 0.072), ("dunes", "#d8a868", 0.029)), sun=("#fffbe0", 0.3, 0.03), visible=135,
        haze_power=2.0,
    ),
    Look(
        "autumn wood", ("autumn wood", "autumn forest", "colourful fall forest"),
        sky=("#8fb0d0", "#f0dcb8"), haze="#dcb88a", ground=("#8a6a34", "#b0642a", "#e8a030"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("tree", 16.9, 6.5, 28, (6, 11), ("#d0621e", "#4c3628")),
            Things("tree", 10.4, 7, 30, (5, 9), ("#d8a52a", "#5a4030")),
            Things("birch", 6.5, 6, 20, (6, 9), ("#d8b83a", "#e8e4dc")),
            Things("bush", 13, 4.7, 12, (0.6, 1.4), ("#a8481e", "#c87a2a")),
        ),
        hills=(("hills", "#a87850", 0.065), ("hills", "#8a5a34", 0.043)), sun=("#fff0c8", 0.22, 0.03),
        clouds=("#f8ecd8", 0.3), visible=95, haze_power=1.5, weather="leaves",
    ),
    Look(
        "coast", ("coast", "seaside coast", "ocean coast"),
        sky=("#3f8fe0", "#cfe8f4"), haze="#c4e0ee", ground=("#8aa85a", "#c9b47c", "#f4f0d8"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("bush", 15.6, 4.8, 14, (0.6, 1.5), ("#5a8a44", "#86a85a")),
            Things("rock", 11.7, 5, 18, (0.5, 2), ("#a8a090", "#6c6860")),
            Things("palm", 3.9, 6, 14, (5, 8), ("#4f8a3c", "#8a6a48")),
            Things("tuft", 18.2, 4.6, 10, (0.5, 1), ("#b8b860", "#d8cf8a")),
            Things("house", 2.1, 12, 24, (4, 6), ("#f4f0e4", "#3f74b0")),
        ),
        hills=(("hills", "#8fb4c0", 0.036), ("hills", "#7ca06a", 0.025)), sun=("#ffffe8", 0.32, 0.03),
        clouds=("#ffffff", 0.4), visible=135, haze_power=2.0, rail=("rail", "#e4e8ea"), sea="#2f86b4",
    ),
    Look(
        "rain", ("rainy", "heavy rain", "grey wet rain"),
        sky=("#5a6674", "#98a4ae"), haze="#8c98a2", ground=("#53683f", "#3f5434", "#7a8a58"), pattern="grass",
        road=("#494d55", "#dcdcd4", "#66625a"),
        things=(
            Things("tree", 14.3, 6.5, 28, (5, 9), ("#3f5e38", "#3c302a")),
            Things("pole", 3.6, 5, 5.3, (6, 7), ("#4a443f", "#6a625a")),
            Things("bush", 15.6, 4.8, 13, (0.7, 1.5), ("#4a6a3a", "#5f7a44")),
            Things("sign", 2, 4.8, 5.2, (2.4, 2.8), ("#d8c03a", "#2a2a2a")),
        ),
        hills=(("hills", "#7c8890", 0.065), ("hills", "#66747a", 0.036)), clouds=("#76828e", 0.7), visible=80,
        haze_power=1.1, weather="rain", night=True,
    ),
    Look(
        "fog", ("foggy", "thick fog", "misty grey fog"),
        sky=("#c2c8ca", "#d2d6d6"), haze="#cdd2d2", ground=("#77845c", "#5c6c4a", "#a8ac8c"), pattern="grass",
        road=("#70747a", "#ecece6", "#8c8a80"),
        things=(
            Things("tree", 15.6, 6, 22, (5, 9), ("#4c6044", "#443a34")),
            Things("bush", 18.2, 4.7, 11, (0.7, 1.6), ("#5a6e48", "#76865a")),
            Things("fence post", 18.2, 4.9, 5, (1, 1.2), ("#6a5c4e", "#8c7c6a")),
            Things("pole", 3.2, 5.4, 5.8, (6, 7), ("#54504c", "#6c6660")),
        ),
        hills=(("hills", "#c2c8c8", 0.043),), visible=75, haze_power=0.85,
    ),
    Look(
        "night", ("night", "dark starry night", "late at night"),
        sky=("#060a1e", "#1c2a4e"), haze="#18223e", ground=("#24384a", "#2f4a52", "#6a86a0"), pattern="grass",
        road=("#333846", "#d8dcc8", "#3f4656"),
        things=(
            Things("tree", 24, 6.5, 28, (5, 9), ("#2c4a4e", "#2a2830")),
            Things("lamp", 4.4, 5, 5.2, (6, 7), ("#5a5c66", "#ffdf9a"), 0.8),
            Things("bush", 14.3, 4.8, 13, (0.7, 1.5), ("#34565a", "#40666a")),
            Things("reflector", 10.4, 4.4, 4.5, (0.9, 1), ("#c8d0d8", "#ff5a3a"), 0.4),
            Things("house", 1.8, 12, 24, (4, 6), ("#4c5068", "#ffd27a"), 0.3),
        ),
        hills=(("hills", "#141f38", 0.072), ("hills", "#101a2c", 0.036)), sun=("#f4f0dc", 0.3, 0.045),
        clouds=("#16203e", 0.25), stars=70, visible=100, night=True,
    ),
    Look(
        "jungle", ("jungle", "green jungle", "tropical rainforest"),
        sky=("#9cc4c0", "#dcecc8"), haze="#a8c8a0", ground=("#3f6a2c", "#2c5022", "#8ab83a"), pattern="grass",
        road=("#5c564c", "#dcd4b0", "#6e5a3c"),
        things=(
            Things("palm", 11.7, 5.8, 22, (6, 11), ("#2f7a34", "#6a5238")),
            Things("tree", 14.3, 7, 26, (8, 14), ("#2c642c", "#4a3a2a")),
            Things("fern", 23.4, 4.6, 12, (0.9, 2), ("#3f9038", "#8ac04a")),
            Things("bush", 15.6, 4.8, 14, (1, 2.4), ("#2f702e", "#5aa03a")),
        ),
        hills=(("hills", "#7ca888", 0.101), ("hills", "#4c7c4a", 0.065)), clouds=("#e8f4e0", 0.4), visible=75,
        haze_power=1.3,
    ),
    Look(
        "thunderstorm", ("thunderstorm", "dark stormy", "stormy weather"),
        sky=("#252a38", "#6c6a74"), haze="#565a66", ground=("#4a5a34", "#5e6a3a", "#8c8a52"), pattern="grass",
        road=("#404450", "#dcdcd0", "#54504c"),
        things=(
            Things("bare tree", 12, 6, 26, (5, 8), ("#2c2824", "#4a423a")),
            Things("tree", 15, 7, 28, (5, 9), ("#36492e", "#2e2822")),
            Things("pole", 3.6, 5, 5.4, (6, 7), ("#3c3834", "#5a544c")),
            Things("tuft", 23.4, 4.6, 10, (0.6, 1.1), ("#7a7a44", "#a09a5a")),
        ),
        hills=(("mountains", "#444a5a", 0.072), ("hills", "#3c443c", 0.036)), clouds=("#171a24", 0.8), visible=95,
        haze_power=1.3, weather="rain", night=True,
    ),
    Look(
        "wheat fields", ("wheat fields", "golden wheat fields", "ripe grain fields"),
        sky=("#4f94dc", "#dcecf4"), haze="#e8dcae", ground=("#d8b04a", "#b88a30", "#f4dc86"), pattern="rows",
        road=ASPHALT,
        things=(
            Things("wheat", 30, 4.7, 12, (0.9, 1.2), ("#dcb44e", "#f4dc8a")),
            Things("hay", 4.5, 8, 26, (1.4, 1.7), ("#d8b460", "#a07c38")),
            Things("tree", 18, 7, 28, (6, 9), ("#4f7a34", "#5a4430")),
            Things("pole", 3.1, 5.2, 5.5, (6, 7), ("#6c5844", "#8c765c")),
        ),
        hills=(("hills", "#a8b890", 0.043), ("hills", "#c4a858", 0.025)), sun=("#fffce0", 0.32, 0.03),
        clouds=("#ffffff", 0.45), visible=130, haze_power=2.0,
    ),
    Look(
        "cherry blossom", ("cherry blossom", "blooming cherry trees", "pink spring blossom"),
        sky=("#8cc0ec", "#fbe4ec"), haze="#f4dce4", ground=("#86ac58", "#a8c46c", "#f8c0d4"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("tree", 19.5, 6, 24, (5, 8), ("#f4a8c4", "#5c4038")),
            Things("bush", 14.3, 4.7, 12, (0.6, 1.4), ("#6f9c44", "#f0b0c8")),
            Things("lantern", 4.5, 4.9, 5.1, (2.4, 2.8), ("#8a8c90", "#ffe0a0"), 0.3),
            Things("torii", 0.7, 0, 0, (7, 8), ("#d8402c", "#2c2a2c")),
        ),
        hills=(("mountains", "#b4c0dc", 0.094), ("hills", "#a4bc88", 0.036)), sun=("#fffbe8", 0.3, 0.03),
        clouds=("#ffffff", 0.4), weather="petals",
    ),
    Look(
        "pine forest", ("pine forest", "deep green pine forest", "evergreen forest"),
        sky=("#7ca8cc", "#d8e4e0"), haze="#b8ccc4", ground=("#4c6038", "#6a5a38", "#8ca05a"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("pine", 31.2, 6.2, 30, (6, 13), ("#2c5638", "#4a3828")),
            Things("bush", 13, 4.7, 12, (0.6, 1.4), ("#45683a", "#6c8448")),
            Things("rock", 7.8, 4.8, 14, (0.5, 1.6), ("#8c8c84", "#585850")),
            Things("stump", 5.2, 5, 14, (0.5, 0.8), ("#7c5c40", "#c8a478")),
        ),
        hills=(("mountains", "#9cb0bc", 0.101), ("hills", "#4f6e58", 0.05)), clouds=("#f4f8fa", 0.35), visible=95,
        haze_power=1.4,
    ),
    Look(
        "alpine meadow", ("alpine meadow", "green alps", "mountain meadow in spring"),
        sky=("#3478d0", "#cfe4f4"), haze="#c4dcea", ground=("#5fa03c", "#7cb848", "#fff4f8"), pattern="grass",
        road=ASPHALT,
        things=(
            Things("pine", 19, 7, 30, (5, 10), ("#2f6440", "#4c3a2a")),
            Things("house", 2.3, 11, 24, (4, 6), ("#8c6240", "#5a3424")),
            Things("fence post", 18.2, 75, 5.1, (1, 1.2), ("#8c704c", "#b0946c")),
            Things("tuft", 20.8, 4.6, 12, (0.4, 0.8), ("#8cc04c", "#f8d84a")),
            Things("rock", 6.5, 5, 18, (0.5, 1.8), ("#a8a8a4", "#70706c")),
        ),
        hills=(("snow mountains", "#8c9cb8", 0.173), ("hills", "#5c9450", 0.043)), sun=("#ffffe8", 0.34, 0.03),
        clouds=("#ffffff", 0.35), visible=135, haze_power=2.0,
    ),
    Look(
        "red canyon", ("red canyon", "canyon of red rock", "red rock canyon"),
        sky=("#2f7cc8", "#f0cfa4"), haze="#e4b088", ground=("#b8683c", "#94482a", "#7c8a4a"), pattern="scree",
        road=("#75655c", "#f4e4b8", "#b06c44"),
        things=(
            Things("cliff", 15.6, 13, 26, (9, 20), ("#c0603a", "#8a3c24")),
            Things("rock", 13, 4.8, 12, (0.6, 2.4), ("#b8623c", "#74341e")),
            Things("bush", 13, 4.7, 12, (0.5, 1.2), ("#76864a", "#9c985a")),
            Things("bare tree", 2.6, 6, 12, (3, 5), ("#6c4c38", "#8c6a50")),
        ),
        hills=(("mesas", "#c87850", 0.13), ("mesas", "#a8583a", 0.065)), sun=("#fffbe0", 0.36, 0.03),
        clouds=("#fff4e4", 0.2), haze_power=1.7,
    ),
    Look(
        "savanna", ("savanna", "golden african savanna", "dry grass savanna"),
        sky=("#e8a44c", "#ffe0a0"), haze="#f4cc88", ground=("#c09a44", "#a07c34", "#e8cc74"), pattern="grass",
        road=("#84705c", "#f4e8c4", "#b8925a"),
        things=(
            Things("acacia", 7.8, 7, 30, (5, 8), ("#6a7a34", "#5c4430")),
            Things("tuft", 31.2, 4.6, 14, (0.7, 1.3), ("#d0a848", "#ecd07c")),
            Things("rock", 5.2, 5, 22, (0.6, 2), ("#a4845c", "#6c5438")),
            Things("mound", 3.9, 6, 18, (1.2, 2.6), ("#a8643a", "#74402a")),
        ),
        hills=(("hills", "#c8a068", 0.043), ("hills", "#b08a4c", 0.022)), sun=("#fff4b0", 0.14, 0.06),
        clouds=("#ffcf90", 0.25), visible=130, haze_power=1.8,
    ),
    Look(
        "tropical island", ("tropical island", "sunny island with palms", "palm beach"),
        sky=("#1f8ce8", "#b8ecf4"), haze="#bce8ee", ground=("#ecd8a0", "#8cc058", "#ffffff"), pattern="sand",
        road=("#8c8880", "#fffae0", "#e8d49c"),
        things=(
            Things("palm", 18.2, 5.6, 22, (5, 9), ("#3c9c44", "#9c7850")),
            Things("fern", 13, 4.7, 12, (0.7, 1.4), ("#4cac4c", "#a4d060")),
            Things("bush", 7.8, 5, 14, (0.7, 1.5), ("#e84c84", "#4c9c44")),
            Things("hut", 2.6, 10, 20, (3.5, 5), ("#c8a068", "#8c6438")),
        ),
        hills=(("hills", "#6cb0a0", 0.072), ("hills", "#5ca058", 0.036)), sun=("#ffffe0", 0.36, 0.03),
        clouds=("#ffffff", 0.35), visible=135, haze_power=2.0, sea="#28b4c4",
    ),
    Look(
        "bamboo grove", ("bamboo grove", "green bamboo forest", "bamboo thicket"),
        sky=("#b4dcb0", "#ecf8d4"), haze="#c4e4b0", ground=("#6c8c44", "#8c8448", "#c4d874"), pattern="grass",
        road=("#7c7a70", "#f0ecd0", "#9c8c64"),
        things=(
            Things("bamboo", 32, 5.4, 22, (7, 12), ("#5ca444", "#a4c85c")),
            Things("fern", 15.6, 4.6, 10, (0.6, 1.2), ("#4c9440", "#94bc54")),
            Things("lantern", 3.9, 4.8, 5, (2, 2.4), ("#8c8c84", "#ffe8b0"), 0.2),
            Things("rock", 5.2, 4.7, 9, (0.5, 1.2), ("#94988c", "#5c6454")),
        ),
        hills=(("hills", "#9ccc94", 0.094), ("hills", "#74ac64", 0.058)), visible=75, haze_power=1.2,
    ),
    Look(
        "old village", ("old village", "small village with houses", "country village"),
        sky=("#5c98d8", "#dcecf4"), haze="#ccdce4", ground=("#74984c", "#98a85c", "#e8d8b0"), pattern="grass",
        road=("#78747c", "#f0ece0", "#b0a08c"),
        things=(
            Things("house", 6, 9.5, 16, (5, 7.5), ("#ece0c4", "#b0503c")),
            Things("house", 3, 10, 18, (5, 7), ("#d8b890", "#7c4c3c")),
            Things("tree", 10, 7, 26, (5, 8), ("#4c8440", "#5c4434")),
            Things("lamp", 3.9, 75, 5.2, (4.5, 5.2), ("#4c4c54", "#fff0c8"), 0.1),
            Things("bush", 11.7, 4.8, 8, (0.7, 1.3), ("#548c44", "#e8a8b8")),
        ),
        hills=(("hills", "#94b4b8", 0.065), ("hills", "#7ca468", 0.036)), sun=("#ffffe8", 0.32, 0.03),
        clouds=("#ffffff", 0.4), haze_power=1.8, rail=("fence", "#f0ece4"),
    ),
    Look(
        "tulip fields", ("tulip fields", "colourful tulip fields", "blooming tulips"),
        sky=("#5ca4e8", "#e0f0f8"), haze="#d4e8ec", ground=("#4c8c3c", "#e83c50", "#ffd83c"), pattern="rows",
        road=ASPHALT,
        things=(
            Things("tulip", 30, 4.7, 12, (0.6, 0.9), ("#f0405c", "#4c9c44")),
            Things("tulip", 14, 5, 14, (0.6, 0.9), ("#ffcc3c", "#4c9c44")),
            Things("windmill", 3, 13, 28, (8, 11), ("#c89c7c", "#f4ece0")),
            Things("tree", 18, 7, 28, (6, 9), ("#58904c", "#5c4838")),
        ),
        hills=(("hills", "#a4c4b0", 0.036), ("hills", "#84b074", 0.022)), sun=("#ffffe8", 0.34, 0.03),
        clouds=("#ffffff", 0.5), visible=130, haze_power=2.0,
    ),
)  # fmt: skip

LOOKS: dict[str, Look] = {look.name: look for look in (*DREAMT, *_OF_THE_EARTH)}
