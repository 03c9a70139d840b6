"""Pictures in an output that tell how it came about: the photos as the model saw them, the losses."""

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dreambooth.base import say, short_path
from dreambooth.decode import load_image
from dreambooth.images import image_grid
from dreambooth.training.loss import loss_means

PHOTO_SHEET, LOSS_PLOT = "photos.png", "losses.png"
COLOURS = {"instance": "#1f77b4", "prior": "#ff7f0e"}


def save_photo_sheet(folder, s, concepts, views):
    """One picture of all photos, cropped as they are trained on, with a tint over what a mask leaves out."""
    crops = [views[path].tinted(load_image(path)) for concept in concepts for path, _ in concept.photos]
    crops = [crop.resize([round(side * min(1, 256 / max(crop.size))) for side in crop.size]) for crop in crops]
    cell = [max(sides) for sides in zip(*(crop.size for crop in crops))]
    crops = [ImageOps.pad(crop, cell, color="white") if list(crop.size) != cell else crop for crop in crops]
    image_grid(crops, columns=min(5, len(crops))).save(folder / PHOTO_SHEET)
    say(f"The photos as the model will see them: {short_path(folder / PHOTO_SHEET)}; later in {s.output_dir}.")


def loss_plot(history, size=(800, 400), margin=50):
    """A picture of the losses over the steps, each point the mean of a fiftieth of the run, since single steps are noise."""
    steps, length = len(history), -(-len(history) // 50)
    ends = [min(start + length, steps) for start in range(0, steps, length)]
    means = [loss_means(history[max(0, end - length):end]) for end in ends]
    curves = {name: [mean[name] for mean in means] for name in COLOURS if means[0][name] is not None}
    top = max(max(curve) for curve in curves.values()) or 1
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    paper, (width, height) = ImageDraw.Draw(image), (size[0] - 2 * margin, size[1] - 2 * margin)

    def place(step, loss):
        return margin + step / steps * width, margin + (1 - loss / top) * height
    for loss in (0, top / 4, top / 2, top * 3 / 4, top):
        paper.line([place(0, loss), place(steps, loss)], "#dddddd")
        paper.text((margin - 5, place(0, loss)[1]), f"{loss:.3f}", "black", font, anchor="rm")
    paper.text((margin + width, margin + height + 5), f"step {steps}", "black", font, anchor="ra")
    for number, (name, curve) in enumerate(curves.items()):
        paper.line([place(end, loss) for end, loss in zip(ends, curve)], COLOURS[name], width=2)
        paper.text((margin + 150 * number, margin / 2), f"{name} loss", COLOURS[name], font, anchor="lm")
    return image
