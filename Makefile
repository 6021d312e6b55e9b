# make demo       the whole method on rendered data, from a fresh machine: about 6 minutes
# make test       the tests: about 6 minutes;  make test-slow: those that take longer
PYTHON ?= python3
PY = .venv/bin/python
DEMO = demo
# threads that spin while they wait cost most of a busy machine
export OMP_WAIT_POLICY = passive
# the name pre-train_DVSCL.py gives the demo's run
RUN = memory_softmax_4096_alexnet_lr_0.003_decay_0.0001_bsz_32_view_RGB_D_amp_seed_0
PRETRAINED = $(DEMO)/runs/$(RUN)/last.pth
SHARED = --data_folder $(DEMO)/data --cache $(DEMO)/cache --tb_path $(DEMO)/tensorboard \
         --resume auto --amp
HEADS = $(SHARED) --dataset casme3 --model alexnet --save_path $(DEMO)/results

.PHONY: demo test test-slow faces clean-demo

demo: .venv/ready
	$(PY) render_CASME3.py --data_folder $(DEMO)/data --subjects 12 --clips_per_subject 8
	$(PY) pre-train_DVSCL.py $(SHARED) --model_path $(DEMO)/runs --batch_size 32 --epochs 50
	$(PY) LinearProbing_DVSCL_10fold.py $(HEADS) --model_path random --batch_size 16
	$(PY) LinearProbing_DVSCL_10fold.py $(HEADS) --model_path $(PRETRAINED) --batch_size 16
	$(PY) fine-tune_DVSCL.py $(HEADS) --model_path $(PRETRAINED) --batch_size 16 --epochs 10 \
	    --lr_decay_epochs 5 8 --subject spNO1 spNO2 spNO3
	$(PY) compare_results.py $(DEMO)/results/probe_random*/results.json \
	    $(DEMO)/results/probe_memory*/results.json
	@echo
	$(PY) compare_results.py --common $(DEMO)/results/probe_random*/results.json \
	    $(DEMO)/results/probe_memory*/results.json $(DEMO)/results/finetune*/results.json
	@echo
	@echo "curves: .venv/bin/tensorboard --logdir $(DEMO)/tensorboard"

test: .venv/test-ready
	$(PY) -m pytest

test-slow: .venv/test-ready
	$(PY) -m pytest -m slow

# the face detector of prepare_CASME3.py; without its pins, which would replace torch
faces: .venv/ready
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-prepare.txt requests
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps facenet-pytorch

clean-demo:
	rm -rf $(DEMO)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.11 demo"; exit 2; }
	$(PYTHON) -m venv .venv || \
	    { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt requirements-prepare.txt
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-test.txt
	touch $@
