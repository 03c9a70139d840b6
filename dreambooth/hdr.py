"""Pictures with light brighter than white, PQ's and HLG's (ITU-R BT.2100), toned down to what an ordinary screen shows."""

from PIL import Image

WHITE = 203  # candela per square metre that a white sheet has in such pictures (ITU-R BT.2408)
BRIGHTEST = 1000  # of the screen that HLG's light is reckoned for
KNEE = 0.6  # of white; light up to here stays as it is, and what is above fills the rest
LUMINANCE = (0.2627, 0.678, 0.0593)  # of BT.2020's red, green and blue
ROWS = 256  # that are held as numbers at a time


def light_of_pq(values):
    """Light, 1 that of white, of PQ's values in 0 to 1 (SMPTE ST 2084)."""
    root = values ** (32 / 2523)
    return 10000 / WHITE * ((root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)) ** (16384 / 2610)


def light_of_hlg(values):
    """The light of a scene, in 0 to 1, of HLG's values."""
    import numpy as np

    return np.where(values <= 0.5, values ** 2 / 3, (np.exp((values - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def toned_down(image, curve):
    """An RGB image of the curve "PQ" or "HLG" in the same primaries, with sRGB's curve."""
    import numpy as np

    light_of = {"PQ": light_of_pq, "HLG": light_of_hlg}[curve]
    table = light_of(np.arange(256) / 255).astype(np.float32)
    values, out = np.asarray(image.convert("RGB")), np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, ROWS):
        light = table[values[top:top + ROWS]]
        if curve == "HLG":
            light *= BRIGHTEST / WHITE * (light @ np.array(LUMINANCE, np.float32))[..., None] ** np.float32(0.2)
        most = light.max(-1, keepdims=True)
        pressed = KNEE + (1 - KNEE) * (1 - np.exp(-(most - KNEE).clip(0) / (1 - KNEE)))
        light *= np.where(most > KNEE, pressed / most.clip(KNEE), 1)
        out[top:top + ROWS] = (255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)).round()
    return Image.fromarray(out)
