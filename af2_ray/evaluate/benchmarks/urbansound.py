"""UrbanSound8K: 8732 clips of 10 classes; `metadata/UrbanSound8K.csv`, clips in `audio/fold1` to `audio/fold10`.

https://urbansounddataset.weebly.com/urbansound8k.html
"""

from af2_ray.evaluate.benchmarks.csv_files import folder_beside, labelled_csv

URBANSOUND = labelled_csv(
    ("slice_file_name", "fold", "class"),
    clip=lambda row: (f"fold{row['fold']}/{row['slice_file_name']}", row["class"]),
    folder=lambda uri: folder_beside(uri, "audio"),
)
