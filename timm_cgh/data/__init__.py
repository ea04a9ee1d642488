from .digits import Digits
from .labelled import ImageSubset, class_numbers, labels_of, open_eval_datasets
from .loader import Batch, EpochBatchSampler, ViewDataset, ViewLoader, ViewsToDevice, create_view_loader
from .sources import data_name, image_mode, is_stream, num_images, open_dataset
from .stream import ViewStream
from .views import Photometric, ViewSpec, multi_crop, two_views
