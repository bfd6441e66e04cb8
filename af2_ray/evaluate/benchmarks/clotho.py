"""Clotho: `file_name, caption_1` to `caption_5`; clips in the folder of the split, beside the CSV.

https://zenodo.org/records/4783391
"""

from af2_ray.evaluate.benchmarks.csv_files import captioned_csv, folder_of_split

_CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))

CLOTHO = captioned_csv(
    ("file_name", *_CAPTIONS),
    clip=lambda row: (row["file_name"], [row[column] for column in _CAPTIONS]),
    folder=folder_of_split,
)
