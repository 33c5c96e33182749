"""Looks of the drawn world that no footage has: other planets, dreams, fairy tales."""

from __future__ import annotations

from ldm.data.world_look import Look, Things

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
