"""Fine-tuning of MAE-SFER on AffectNet: main_finetune.py with its defaults, seven classes.

  python main_finetune_affectnet.py --model mae_vit_base_patch16 --batch_size 16 --accum_iter 2 \\
      --blr 5e-4 --layer_decay 0.65 --mixup 0.8 --cutmix 1.0 --epochs 100 \\
      --finetune out_dir_base/checkpoint-299.pth --data_path AffectNet
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import finetuning


@util.command_line
def main(argv=None):
    finetuning.finetune(finetuning.parse_option(__doc__, argv, "affectnet7", "AffectNet"), argv,
                        __file__)


if __name__ == "__main__":
    main()
