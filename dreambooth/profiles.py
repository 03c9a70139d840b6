"""Colour profiles of files that say their colours in numbers alone: gAMA and cHRM in PNG, ITU-T H.273's code points.

Knows nothing of what is done with a profile.
"""

import contextlib
import re
import struct

from dreambooth.base import say_once

SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green and blue
PRIMARIES = {1: SRGB, 9: (*SRGB[:2], 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # H.273's numbers: BT.709, BT.2020, Display P3
             12: (*SRGB[:2], 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)}
BRIGHTER = {16: "PQ", 18: "HLG"}  # than any screen's white
CURVES = {**dict.fromkeys((1, 2, 6, 13, 14, 15, *BRIGHTER)), 4: 2.2, 5: 2.8, 8: 1.0}  # gamma; None: sRGB's curve
D50 = (0.9642, 1, 0.8249)


def profile_in_numbers(path, image):
    """The ICC profile, as bytes, of an open picture that has none but says its colours in numbers; None if they are sRGB's.

    Of one that is BRIGHTER it is that of the picture toned down.
    """
    chunks = short_chunks(path) if image.format == "PNG" else {}
    if codes := code_points(path, image, chunks):
        known = codes[0] in PRIMARIES and codes[1] in CURVES
        return written(PRIMARIES[codes[0]], CURVES[codes[1]]) if known else None
    if "sRGB" in chunks:
        return None
    places, gamma = chunks.get("cHRM", b""), int.from_bytes(chunks.get("gAMA", b""), "big") / 100000
    places = tuple(number / 100000 for number in struct.unpack(">8I", places)) if len(places) == 32 else SRGB
    return written(places, None if not gamma or abs(1 / gamma - 2.2) < 0.05 else 1 / gamma)


def brighter_curve(path, image):
    """"PQ" or "HLG" if an open picture is HDR, which is said; else None."""
    codes = code_points(path, image, short_chunks(path) if image.format == "PNG" else {})
    if name := BRIGHTER.get(codes[1]) if codes else None:
        say_once(f"Note: {path} is HDR ({name}); what is brighter than white is toned down.")
    return name


def short_chunks(path):
    """{kind: content} of the chunks of up to 32 bytes before a PNG's pixels."""
    chunks = {}
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            content = file.read(length) if length <= 32 else None
            if content is not None:
                chunks.setdefault(head[4:].decode("latin-1"), content)
            file.seek(4 if content is not None else length + 4, 1)
    return chunks


def code_points(path, image, chunks):
    """(primaries, transfer) by H.273's numbers, where a file has them, or its ICC profile does; else None."""
    profile = image.info.get("icc_profile") or b""
    if found := re.search(rb"cicp\0{4}(..)", profile, re.DOTALL):
        return tuple(found[1])
    if found := re.search(rb"2100.?(PQ|HLG)", profile.replace(b"\0", b"")):  # ITUR_2100_PQ_FULL, as it was before PNG had cICP
        return 9, {b"PQ": 16, b"HLG": 18}[found[1]]
    if image.format == "PNG":
        return tuple(chunks["cICP"][:2]) if len(chunks.get("cICP", b"")) == 4 else None
    if image.format == "AVIF":
        with open(path, "rb") as file:
            box = file.read(2**16).partition(b"colrnclx")[2][:4]
        return struct.unpack(">HH", box) if len(box) == 4 else None
    codes = image.info.get("nclx_profile") or {}
    return (codes["color_primaries"], codes["transfer_characteristics"]) if codes else None


def written(places, gamma):
    """The ICC profile of colours whose white, red, green and blue have these x and y. None for sRGB's, and for impossible ones."""
    if gamma is None and max(abs(one - other) for one, other in zip(places, SRGB)) < 0.002:
        return None
    with contextlib.suppress(ArithmeticError, ValueError, struct.error):  # numbers that no light has
        return icc(primaries_at_d50(places), gamma)


def primaries_at_d50(places):
    """XYZ of red, green and blue under the white that profiles have, adapted as Bradford's."""
    import numpy as np

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])
    white, *lights = (xyz(*places[i:i + 2]) for i in range(0, 8, 2))
    lights = np.stack(lights, 1)
    try:
        lights = lights * np.linalg.solve(lights, white)
    except np.linalg.LinAlgError:
        raise ValueError("these lights mix to no white") from None
    eye = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(eye) @ np.diag(eye @ D50 / (eye @ white)) @ eye
    return (adapted @ lights).T.tolist()


def icc(primaries, gamma):
    """An ICC profile, version 4, of three primaries and one curve."""
    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)
    curve = b"para\0\0\0\0" + (struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if gamma is None
                               else struct.pack(">HH", 0, 0) + fixed(gamma))
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2, 28) + "x".encode("utf-16-be") + b"\0\0"
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    tags |= {kind: b"XYZ \0\0\0\0" + fixed(*light) for kind, light in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28 + fixed(*D50) + b"\0" * 48
    return head + table + body
