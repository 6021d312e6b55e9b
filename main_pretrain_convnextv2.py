"""Pre-training of MAE-SFER: a masked autoencoder on ConvNeXt V2 (FCMAE), from images alone.

  python main_pretrain_convnextv2.py --model convnextv2_base --batch_size 64 --update_freq 8 \\
      --blr 1.5e-4 --epochs 400 --data_path AffectNet/Manually_Annotated_Images \\
      --output_dir out_dir_base_1

Three fifths of an image's cells of 32 pixels are hidden, and their pixels predicted; the encoder
computes what is visible alone. Writes checkpoint-<epoch>.pth, which main_finetune.py starts from,
curves and reconstructions.png. Several GPUs: torchrun --nproc_per_node 4
main_pretrain_convnextv2.py with the same flags.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import pretraining
from models.convnextv2 import CELL, CONVNEXT_NAMES, create_fcmae
from training import masked_options

DEFAULT = masked_options.PRETRAIN[1]


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    pretraining.add_options(parser, CONVNEXT_NAMES, "convnextv2_base", DEFAULT, mask_ratio=0.6,
                            norm_pix_loss=True, decoder_depth=1, cell=CELL)
    return pretraining.parse_option(parser, DEFAULT, CELL, argv)


def set_model(opt):
    return create_fcmae(opt.model, opt.norm_pix_loss, opt.decoder_depth, opt.decoder_embed_dim)


@util.command_line
def main(argv=None):
    pretraining.pretrain(parse_option(argv), argv, __file__, set_model)


if __name__ == "__main__":
    main()
