"""ESC-50: 2000 clips of 50 classes; `meta/esc50.csv` with `filename, fold, category`, clips in `audio`.

https://github.com/karolpiczak/ESC-50
"""

from af2_ray.evaluate.benchmarks.csv_files import folder_beside, labelled_csv

ESC50 = labelled_csv(
    ("filename", "fold", "category"),
    clip=lambda row: (row["filename"], row["category"]),
    folder=lambda uri: folder_beside(uri, "audio"),
)
