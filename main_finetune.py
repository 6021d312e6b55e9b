"""Fine-tuning of MAE-SFER: a pre-trained ViT or ConvNeXt V2 on labelled faces.

  python main_finetune.py --model vit_base_patch16 --finetune out_dir_base/checkpoint-299.pth \\
      --data_set rafdb --data_path RAF-DB --output_dir out_finetune --batch_size 16 \\
      --accum_iter 2 --blr 5e-4 --layer_decay 0.65 --mixup 0.8 --cutmix 1.0 --epochs 100

A tenth of the training set is not trained on: it is there to choose by. The test split is predicted
once, at the end. Several GPUs: torchrun --nproc_per_node 4 main_finetune.py with the same flags.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import finetuning


@util.command_line
def main(argv=None):
    finetuning.finetune(finetuning.parse_option(__doc__, argv, "rafdb", None), argv, __file__)


if __name__ == "__main__":
    main()
