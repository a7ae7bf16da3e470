# shellcheck shell=bash disable=SC2016
# What the scripts of launch/ need. Copy to launch/env.sh and fill in; variables of the
# environment override it.

: "${PROJECT:=}"           # Google Cloud project
: "${ZONE:=}"              # such as us-central2-b
: "${NAME:=gqa-t5x}"       # of the queued resource and of its TPU
: "${ACCELERATOR_TYPE:=}"  # v4-16, v5litepod-8, v5p-8, v6e-8, ...
: "${DEVICES:=}"           # how many JAX has to see: one a chip, on v3 two
: "${PROVISIONING:=spot}"  # spot, reserved or on-demand
: "${BUCKET:=}"            # gs://... in the region of ZONE: data, checkpoints, logs
: "${REPOSITORY:=}"        # git URL of this repository, as the TPU's hosts can read it
: "${COMMIT:=}"            # the commit to check out
# What a shell runs on every host at once, again until it succeeds: lines, pipes and && as
# in a script, which ends at the first that fails. '' for nothing (then: tpu.sh run).
: "${TRAIN:=python -m t5x.train --multiprocess_gpu --gin_file=gin/uptrain_gqa8.gin \
--tfds_data_dir=$BUCKET/tfds --gin.MODEL_DIR=\"'$BUCKET/uptrain_gqa8'\" \
--gin.INITIAL_CHECKPOINT_PATH=\"'$BUCKET/xxl_gqa8/checkpoint_1000000'\" \
--gin.RANDOM_SEED=0}"

# For tpu.sh jobset alone: a slice of GKE.
: "${GKE_ACCELERATOR:=tpu-v5-lite-podslice}"  # or tpu-v4-podslice, tpu-v5p-slice, tpu-v6e-slice
: "${GKE_TOPOLOGY:=2x4}"
: "${GKE_HOSTS:=2}"           # of the slice
: "${GKE_CHIPS_A_HOST:=4}"
