"""File names of the images of a data set."""
import os
from typing import Any, List, Optional

from torch.utils.data import Dataset, Subset

__all__ = ['file_names']


def _reader_names(dataset: Any) -> List[Optional[str]]:
    reader: Any = dataset.reader
    table: Any = getattr(reader, 'dataset', None)
    key = getattr(reader, 'image_key', None)
    if key is None or getattr(table, '_indices', None) is not None:
        return dataset.filenames()
    # hfds: row by row, timm would read every image as well
    return [name for chunk in table.data.column(key).chunks for name in chunk.field('path').to_pylist()]


def file_names(dataset: Dataset) -> Optional[List[str]]:
    """Paths of the images below the data set's root, with `/`; None where the source has no names."""
    if isinstance(dataset, Subset):
        names = file_names(dataset.dataset)
        return names and [names[i] for i in dataset.indices]
    if hasattr(dataset, 'reader'):
        try:
            found = _reader_names(dataset)
        except (AssertionError, AttributeError, KeyError, TypeError):  # Hub data sets whose column has no paths
            return None
    elif hasattr(dataset, 'samples'):  # torchvision's
        found = [os.path.relpath(path, dataset.root) for path, _ in dataset.samples]
    else:
        return None
    return None if None in found else [str(name).replace(os.sep, '/') for name in found]
