# make demo       DVSCL on rendered data, from a fresh machine: about 4 minutes
# make demo-mmnet TM-MMNet on rendered clips: about 5 minutes
# make demo-fer   FER on rendered faces: about 6 minutes
# make demo-mae   MAE-SFER on rendered faces: about 5 minutes
# make test       the tests: about 8 minutes;  make test-slow: those that take longer
PYTHON ?= python3
PY = .venv/bin/python
DEMO = demo
# the name pre-train_DVSCL.py gives the demo's run
RUN = batch_resnet18v1_lr_0.03_decay_0.0001_bsz_64_view_RGB_D_size_56_seed_0
PRETRAINED = $(DEMO)/runs/$(RUN)/last.pth
SHARED = --data_folder $(DEMO)/data --cache $(DEMO)/cache --tb_path $(DEMO)/tensorboard \
         --model resnet18v1 --size 56 --resume auto
HEADS = $(SHARED) --save_path $(DEMO)/results
RESULTS = $(DEMO)/results/probe_random*/results.json $(DEMO)/results/probe_batch*/results.json \
          $(DEMO)/results/finetune*/results.json

# small images, and many small steps, from which two processes of a thread gain more than one of two;
# their scripts take --device cpu, since a machine may have one GPU
TWO = OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node 2

# the published rate and decay are for 100 epochs at 224 pixels
MMNET = --data_folder $(DEMO)/mmnet/data --save_path $(DEMO)/mmnet/results \
        --tb_path $(DEMO)/mmnet/tensorboard --size 48 --epochs 12 --batch_size 8 \
        --learning_rate 0.0005 --weight_decay 0.05 --scale fixed --resume auto --print_freq 8

FER = --dataset rafdb --data_folder $(DEMO)/fer/data --save_path $(DEMO)/fer/results \
      --tb_path $(DEMO)/fer/tensorboard --cache $(DEMO)/fer/cache --pretrained none --size 64 \
      --epochs 10 --batch_size 16 --learning_rate 0.001 --augment flip --noise 0.1 --resume auto \
      --print_freq 2

MAE = --model convnextv2_atto --input_size 96 --cache $(DEMO)/mae/cache --print_freq 5 --amp \
      --device cpu
MAE_FINETUNE = $(MAE) --data_set rafdb --data_path $(DEMO)/mae/data \
               --batch_size 8 --lr 0.001 --epochs 9 --aa none --crop_low 0.9 \
               --reprob 0 --head_init_scale 1

# without its pins, which would replace torch
DETECTOR = $(PY) -m pip install --disable-pip-version-check --quiet --no-deps facenet-pytorch

.PHONY: demo demo-mmnet demo-fer demo-mae test lint check test-slow faces clean-demo

# 24 labelled people, held out in turn; 600 unlabelled pairs of 60 others to pre-train on
demo: .venv/ready
	$(PY) render.py casme3 --data_folder $(DEMO)/data --subjects 24 --clips_per_subject 8 \
	    --size 128 --unlabelled 600 --unlabelled_subjects 60
	$(PY) pre-train_DVSCL.py $(SHARED) --model_path $(DEMO)/runs --batch_size 64 --epochs 25 \
	    --warmup_epochs 2 --pool unlabelled --pairs $(DEMO)/data/pairs.tsv
	$(PY) LinearProbing_DVSCL_10fold.py $(HEADS) --protocol loso --model_path random
	$(PY) LinearProbing_DVSCL_10fold.py $(HEADS) --protocol loso \
	    --model_path $(PRETRAINED)
	$(TWO) fine-tune_DVSCL.py $(HEADS) --protocol loso --model_path $(PRETRAINED) \
	    --epochs 2 --encoder_lr 0.001 --device cpu
	$(PY) compare_results.py $(RESULTS) --picture $(DEMO)/comparison.png
	@echo
	@echo "picture: $(DEMO)/comparison.png"
	@echo "curves:  .venv/bin/tensorboard --logdir $(DEMO)/tensorboard"

# 8 people, held out in turn; expressions three times as strong as in the real set, so that a
# network learns them in two minutes
demo-mmnet: .venv/prepare-ready
	$(PY) render.py casme2 --data_folder $(DEMO)/mmnet/raw --subjects 8 --clips 60 --amplitude 3 \
	    --preview $(DEMO)/mmnet/clips.png
	$(PY) prepare.py casme2 --raw $(DEMO)/mmnet/raw --data_folder $(DEMO)/mmnet/data \
	    --annotation $(DEMO)/mmnet/raw/CASME2-coding-20140508.xlsx --reference onset
	$(TWO) train_MMNet.py $(MMNET) --model mmnet --scale map --device cpu
	$(TWO) train_MMNet.py $(MMNET) --model V4 --device cpu
	$(PY) compare_results.py $(DEMO)/mmnet/results/*/results.json \
	    --picture $(DEMO)/mmnet/comparison.png
	@echo
	@echo "pictures: $(DEMO)/mmnet/clips.png, comparison.png, results/*/mistakes.png (flow)"
	@echo "curves:   .venv/bin/tensorboard --logdir $(DEMO)/mmnet/tensorboard"

# a tenth of the training labels is wrong, so that SCN has something to find
demo-fer: .venv/ready
	$(PY) render.py faces --data_folder $(DEMO)/fer/data --train 1000 --test 500 --subjects 80 \
	    --preview $(DEMO)/fer/faces.png
	$(PY) train_FER.py $(FER)
	$(PY) train_FER.py $(FER) --model scn --rank_margin 0.07 --relabel_epoch 8
	$(PY) compare_results.py $(DEMO)/fer/results/*/results.json \
	    --picture $(DEMO)/fer/comparison.png
	@echo
	@echo "pictures: $(DEMO)/fer/faces.png, comparison.png, results/*/mistakes.png (Grad-CAM),"
	@echo "          results/*/importance.png (SCN)"
	@echo "curves:   .venv/bin/tensorboard --logdir $(DEMO)/fer/tensorboard"

# 920 faces without labels of other people; then 600 with labels, 300 of others to test
demo-mae: .venv/ready
	$(PY) render.py faces --data_folder $(DEMO)/mae/unlabelled --train 900 --test 20 \
	    --subjects 300 --seed 1
	$(PY) render.py faces --data_folder $(DEMO)/mae/data --train 600 --test 300 --subjects 90
	$(TWO) main_pretrain_convnextv2.py $(MAE) --decoder_embed_dim 128 --batch_size 16 --lr 0.001 \
	    --epochs 12 --data_path $(DEMO)/mae/unlabelled/Image/aligned \
	    --output_dir $(DEMO)/mae/pretrained
	$(TWO) main_finetune.py $(MAE_FINETUNE) --layer_decay 1 \
	    --output_dir $(DEMO)/mae/results/scratch
	$(TWO) main_finetune.py $(MAE_FINETUNE) --layer_decay 0.9 \
	    --finetune $(DEMO)/mae/pretrained/checkpoint-11.pth \
	    --output_dir $(DEMO)/mae/results/pretrained
	$(PY) compare_results.py $(DEMO)/mae/results/*/results.json \
	    --picture $(DEMO)/mae/comparison.png
	@echo
	@echo "pictures: $(DEMO)/mae/pretrained/reconstructions.png, comparison.png,"
	@echo "          results/*/mistakes.png (Grad-CAM), results/*/features.png"
	@echo "curves:   .venv/bin/tensorboard --logdir $(DEMO)/mae"

test: .venv/test-ready
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: .venv/test-ready
	.venv/bin/ruff check

# what must hold before a change lands
check: lint test

test-slow: .venv/test-ready
	$(PY) -m pytest -m slow -n auto --maxprocesses 8 --dist worksteal

# the face detector of prepare.py and detect_faces.py
faces: .venv/ready
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-prepare.txt requests
	$(DETECTOR)

clean-demo:
	rm -rf $(DEMO)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.11 demo"; exit 2; }
	$(PYTHON) -m venv .venv || \
	    { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

.venv/prepare-ready: .venv/ready requirements-prepare.txt
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-prepare.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt requirements-prepare.txt
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-test.txt requests
	$(DETECTOR)
	touch $@
