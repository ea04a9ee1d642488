from .loader import Batch, EpochBatchSampler, ViewDataset, ViewsToDevice, ViewStream, create_view_loader
from .sources import image_mode, is_stream, labels_of, open_dataset, open_eval_datasets
from .views import Photometric, ViewSpec, two_views
