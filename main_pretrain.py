"""Pre-training of MAE-SFER: a masked autoencoder on ViT, from images without labels.

  python main_pretrain.py --model mae_vit_base_patch16 --batch_size 32 --accum_iter 4 \\
      --blr 1.5e-4 --epochs 300 --data_path AffectNet/Manually_Annotated_Images \\
      --output_dir out_dir_base

Three quarters of an image's patches are hidden, and their pixels predicted. Writes
checkpoint-<epoch>.pth, which main_finetune.py starts from, curves and reconstructions.png. Several
GPUs: torchrun --nproc_per_node 4 main_pretrain.py with the same flags.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import pretraining
from models.mae import MAE_NAMES, PATCH, create_mae
from training import masked_options

DEFAULT = masked_options.PRETRAIN[0]


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    pretraining.add_options(parser, MAE_NAMES, "mae_vit_base_patch16", DEFAULT, mask_ratio=0.75,
                            norm_pix_loss=False, decoder_depth=8, cell=PATCH)
    return pretraining.parse_option(parser, DEFAULT, PATCH, argv)


def set_model(opt):
    return create_mae(opt.model, opt.norm_pix_loss, opt.size, opt.decoder_depth,
                      opt.decoder_embed_dim)


@util.command_line
def main(argv=None):
    pretraining.pretrain(parse_option(argv), argv, __file__, set_model)


if __name__ == "__main__":
    main()
