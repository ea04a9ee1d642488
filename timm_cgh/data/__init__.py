"""Data sets of images and the loader of their views."""
from .decode import ImageSubset
from .digits import Digits
from .knn_split import open_knn_datasets
from .labels import class_to_idx, read_labels
from .loader import Batch, ViewLoader, create_view_loader
from .prefetch import ViewsToDevice
from .sources import data_name, image_mode, is_stream, num_images, open_dataset
from .view_dataset import EpochBatchSampler, ViewDataset, ViewStream
from .views import Photometric, ViewSpec, multi_crop, two_views
