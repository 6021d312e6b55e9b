"""A small set of faces in RAF-DB's layout: squares whose place is the class."""
import numpy as np
from PIL import Image

CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


def picture(label, rng, side=32):
    """uint8 `[side, side, 3]`: noise, and a bright square at one of seven places."""
    pixels = rng.integers(90, 130, (side, side, 3))
    x, y = 2 + 4 * label, 4 + 8 * (label % 3)
    pixels[y:y + 6, x:x + 6] += 90
    return pixels.clip(0, 255).astype(np.uint8)


def write(folder, train=56, test=21, subjects=0, side=32, seed=0):
    """Writes the set; the labels of both splits, 0 to 6 in turn. subjects: in each split."""
    rng, lines, people = np.random.default_rng(seed), [], ["path,subject"]
    (folder / "EmoLabel").mkdir(parents=True)
    (folder / "Image" / "aligned").mkdir(parents=True)
    labels = {"train": [i % 7 for i in range(train)], "test": [i % 7 for i in range(test)]}
    for split, own in labels.items():
        for i, label in enumerate(own, 1):
            name = f"{split}_{i:05d}"
            path = folder / "Image" / "aligned" / f"{name}_aligned.jpg"
            Image.fromarray(picture(label, rng, side)).save(path, quality=95)
            lines.append(f"{name}.jpg {label + 1}")
            if subjects:
                people.append(f"Image/aligned/{path.name},{split}{i % subjects}")
    (folder / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines))
    if subjects:
        (folder / "subjects.csv").write_text("\n".join(people) + "\n")
    return labels


def write_classes(folder, n, classes):
    """`n` images in folders of the first so many classes, in turn."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / CLASSES[i % classes] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i % classes, rng)).save(path)


def face_points(side=32, rng=None):
    """68 points of a face that fills an image of `side` pixels, float `[68, 2]`."""
    angle = np.linspace(0, np.pi, 17)
    jaw = np.stack([50 - 38 * np.cos(angle), 50 + 38 * np.sin(angle)], 1)
    brows = [np.stack([np.linspace(c - 10, c + 10, 5), np.full(5, 35)], 1) for c in (32, 68)]
    nose = [np.stack([np.full(4, 50), np.linspace(42, 58, 4)], 1),
            np.stack([np.linspace(43, 57, 5), np.full(5, 62)], 1)]
    eyes = [np.array([(c - 6, 45), (c - 2, 43), (c + 2, 43), (c + 6, 45), (c + 2, 47), (c - 2, 47)])
            for c in (32, 68)]
    angle = np.linspace(-np.pi, np.pi, 20)
    mouth = np.stack([50 + 12 * np.cos(angle), 75 + 6 * np.sin(angle)], 1)
    points = np.concatenate([jaw, *brows, *nose, *eyes, mouth]) * side / 100
    return points if rng is None else points + rng.normal(0, .3, points.shape)


def write_landmarks(path, names, points=face_points, side=32):
    """A table of landmarks of these images."""
    rng = np.random.default_rng(0)
    rows = [points(side, rng).ravel() for _ in names]
    head = ["path", *(f"{axis}{i}" for i in range(1, len(rows[0]) // 2 + 1) for axis in "xy")]
    path.write_text("\n".join([",".join(head), *(",".join([name, *(f"{v:.2f}" for v in row)])
                                                 for name, row in zip(names, rows))]) + "\n")
