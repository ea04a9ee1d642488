from .annotations import Annotations, mask_api, training_objects
from .dataset import DetectionImages, training_batches, training_transform
from .detector import create_detector, load_detector, save_detector
from .evaluate import category_numbers, evaluate_detections, find_objects, read_detections, write_detections
from .metrics import Precision, bootstrap_ap50, coco_precision, voc07_precision
from .picture import save_detections_picture
from .readers import open_annotations
from .training import param_groups, rate_factor, recompute_batch_norm, split_steps
