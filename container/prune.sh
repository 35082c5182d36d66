#!/bin/sh
# prune.sh SITE_PACKAGES: remove what no job loads. What is left, and why: container/README.md.
set -eu
cd "$1"
# Tests of the libraries. numpy's own are imported by numpy.testing, which scipy imports. Not every build of torch has them.
rm -rf torch/test
find . -depth -type d \( -name tests -o -name test \) -not -path './torch/*' -not -path './numpy/*' -exec rm -r {} +
# Triton, of the CUDA build, calls a C compiler. With it torch 2.13 has it compute some products; without it, cuBLAS does.
rm -rf triton triton-*.dist-info
# For compiling extensions and for torch.compile: there is no compiler in the image, and the job uses neither.
rm -r torch/include
find torch/bin -type f -not -name torch_shm_manager -delete
find . -name '*.a' -delete
