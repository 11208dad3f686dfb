# The commands of this project; `make help` lists them.

PYTHON ?= python3
PY := .venv/bin/python
DEMO := data/demo
CIFAR10 ?= ../shared/cifar10
IMAGENET1K ?= ../shared/imagenet1k
FIVE_PARTS := imagenet_splits_5

# prints a command as a user would type it in an active environment, and runs it
define run
@echo; echo '$$ $(1)'; PATH="$(CURDIR)/.venv/bin:$$PATH" $(1)
endef

.DEFAULT_GOAL := help
.PHONY: help .venv demo cifar10 cifar10-steps imagenet imagenet-steps test lint bench gpu faults coverage figures clean

help: ## list the commands
	@grep -hE '^[a-zA-Z0-9_.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

.venv: .venv/installed ## make the environment: Python 3.11 or newer, pinned packages, about 5.5 GB

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d is too old; give PYTHON=python3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# steps 3 to 5 in the folder $(1), which gets all outputs, on images and classifiers in the folder $(2); $(3) is the
# threshold of step 5
define steps
$(call run,python generate_data_for_CLCNet.py --data-path $(2)/$(FIVE_PARTS) --model local-dir:$(2)/shallow --output $(1)/shallow.parquet --store $(1)/store)
$(call run,python generate_data_for_CLCNet.py --data-path $(2)/$(FIVE_PARTS) --model local-dir:$(2)/deep --output $(1)/deep.parquet --store $(1)/store)
$(call run,python train_imagenet_5fold_cv.py --imagenet-split $(2)/$(FIVE_PARTS) --cls-output $(1)/shallow.parquet --weight-save $(1)/weights)
$(call run,python eval_imagenet_5fold_cv.py --threshold-searching --imagenet-split $(2)/$(FIVE_PARTS) --shallow-model local-dir:$(2)/shallow --deep-model local-dir:$(2)/deep --weight-save $(1)/weights --store $(1)/store --performance-result $(1)/performance-result.csv > $(1)/evaluation.txt)
@cat $(1)/evaluation.txt
$(call run,python train_custom_data.py --cls-output $(1)/shallow.parquet $(1)/deep.parquet --weight-save $(1)/weights)
$(call run,python eval_custom_data.py --custom-data $(2)/$(FIVE_PARTS) --threshold $(3) --num_classes 10 --shallow-model local-dir:$(2)/shallow --deep-model local-dir:$(2)/deep --weight $(1)/weights/CLCNet_custom_data.zip --store $(1)/store --result $(1)/custom-data-result.csv)
$(call run,python eval_custom_data.py --custom-data $(2)/$(FIVE_PARTS) --policy $(1)/weights/cascade.json --store $(1)/store --result $(1)/policy-result.csv)
@echo; echo 'Step 4 once more, in short:'; echo; sed -n '/^Results/,$$p' $(1)/evaluation.txt
endef

demo: .venv/installed ## the whole way on images of handwriting that it makes: four minutes, all of it under data/demo
	$(call run,python -m examples.demo --output $(DEMO))
	$(call steps,$(DEMO),$(DEMO),0.8)
	@{ echo; echo 'Next: your own images and models, see README.md: Your own images, in five commands'; } >&2

cifar10: .venv/installed ## the same on 10,000 real images, in CIFAR10=FOLDER; and from two tables there alone
	@if [ ! -d $(CIFAR10) ]; then echo 'skipped: there is no folder $(CIFAR10); give CIFAR10=FOLDER'; else $(MAKE) --no-print-directory cifar10-steps; fi

cifar10-steps:
	@mkdir -p data/cifar10
	$(call steps,data/cifar10,$(CIFAR10),0.8)
	$(call run,python train_imagenet_5fold_cv.py --imagenet-split $(CIFAR10)/$(FIVE_PARTS) --cls-output $(CIFAR10)/resnet20.csv $(CIFAR10)/resnet56.csv --weight-save data/cifar10/tables/weights)
	$(call run,python eval_imagenet_5fold_cv.py --threshold-searching --imagenet-split $(CIFAR10)/$(FIVE_PARTS) --shallow-output $(CIFAR10)/resnet20.csv --shallow-model-FLOPs 0.041 --deep-output $(CIFAR10)/resnet56.csv --deep-model-FLOPs 0.126 --weight-save data/cifar10/tables/weights --performance-result data/cifar10/tables/performance-result.csv)

imagenet: .venv/installed ## networks and photographs of ImageNet's 1,000 classes, in IMAGENET1K=FOLDER: the paper's table
	@if [ ! -d $(IMAGENET1K) ]; then echo 'skipped: there is no folder $(IMAGENET1K); give IMAGENET1K=FOLDER'; else $(MAKE) --no-print-directory imagenet-steps; fi

VAL1300 := $(IMAGENET1K)/val1300 --labels $(IMAGENET1K)/val1300/labels.csv

# step 3 on the networks that lie there; all seven's outputs, what is trained on them, and the tables; then step 5 with a
# cascade of the three beside the most accurate of them, each on images that it has not seen
imagenet-steps:
	@mkdir -p data/imagenet
	@rm -rf data/imagenet/store
	$(call run,python generate_data_for_CLCNet.py --data-path $(VAL1300) --model local-dir:$(IMAGENET1K)/mobilenetv2_100_224 --output data/imagenet/mobilenetv2_100_224.parquet --store data/imagenet/store/mobilenetv2_100_224)
	$(call run,python generate_data_for_CLCNet.py --data-path $(VAL1300) --model local-dir:$(IMAGENET1K)/tf_efficientnet_lite0 --output data/imagenet/tf_efficientnet_lite0.parquet --store data/imagenet/store/tf_efficientnet_lite0)
	$(call run,python generate_data_for_CLCNet.py --data-path $(VAL1300) --model local-dir:$(IMAGENET1K)/tf_efficientnet_lite2 --output data/imagenet/tf_efficientnet_lite2.parquet --store data/imagenet/store/tf_efficientnet_lite2)
	$(call run,python -m benchmarks.imagenet outputs --imagenet1k $(IMAGENET1K) --tables data/imagenet/outputs)
	$(call run,python train_imagenet_5fold_cv.py --cls-output data/imagenet/outputs/*.parquet --weight-save data/imagenet/weights)
	$(call run,python train_custom_data.py --cls-output data/imagenet/outputs/*.parquet --weight-save data/imagenet/weights)
	$(call run,python eval_imagenet_5fold_cv.py --outputs data/imagenet/outputs/*.parquet --weight-save data/imagenet/weights --performance-result data/imagenet/performance-result.csv)
	$(call run,python -m benchmarks.imagenet table --tables data/imagenet/outputs --weights data/imagenet/weights)
	$(call run,python train_custom_data.py --cls-output data/imagenet/mobilenetv2_100_224.parquet data/imagenet/tf_efficientnet_lite0.parquet data/imagenet/tf_efficientnet_lite2.parquet --weight-save data/imagenet/policy)
	$(call run,python eval_custom_data.py --custom-data $(VAL1300) --policy data/imagenet/policy/cascade.json --store data/imagenet/store/policy --result data/imagenet/policy-result.csv)
	$(call run,python eval_custom_data.py --custom-data $(VAL1300) --threshold -999 --shallow-model local-dir:$(IMAGENET1K)/tf_efficientnet_lite2 --store data/imagenet/store/single --result data/imagenet/single-result.csv)

# two files of tests at a time, each on one thread
PYTEST := pytest -n 2 --dist loadfile

test: .venv/installed-dev ## run all tests
	OMP_NUM_THREADS=1 $(PY) -m $(PYTEST)

lint: .venv/installed-dev ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/installed-dev ## measure speed, as ratios, into benchmarks/results
	@for bench in benchmarks/bench_*.py; do \
		module=benchmarks.$$(basename $$bench .py); \
		echo "$(PY) -m $$module"; $(PY) -m $$module || exit 1; \
	done

gpu: .venv/installed-dev ## on a machine with GPUs: speed, how busy, the same bytes from two processes, into benchmarks/results
	$(PY) -m pytest tests/test_classifiers.py tests/test_runner.py tests/test_cascade_on_images.py
	$(PY) -m benchmarks.bench_processes

faults: .venv/installed-dev ## try to break everything, count what broke into benchmarks/results: about eight minutes
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.faults

coverage: .venv/installed-dev ## run all tests and name the lines of the package that none of them runs
	$(PY) -m coverage erase
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m $(PYTEST)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

figures: .venv/installed ## draw the pictures again and copy measured figures into the documents
	$(PY) images/idea.py
	$(PY) -m benchmarks.figures

clean: ## remove what the demo and the tests made, not the environment
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
