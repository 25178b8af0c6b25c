# Device code: csrc/cuda/*.cu, free of torch headers, into an OBJECT library. Compiled and linked into
# _C only when torch itself is a CUDA build of the same major version; otherwise it would be of no
# use. (tests/test_cuda_gates.py compiles it anyhow, and takes the flags from here.)
# FORCE_CUDA=1 turns every reason for leaving it out into an error.
#
# In: CUDA_SOURCES, TORCH_CUDA. Out: CUDA_STATE, CUDA_VERSION, CUDA_ARCHS, LINK_CUDA, HOPPER (whether
# the kernels for Hopper alone are among them).

set(FORCE_CUDA OFF)
if("$ENV{FORCE_CUDA}" MATCHES "^(1|ON|on|true|TRUE|yes|YES)$")
  set(FORCE_CUDA ON)
endif()

function(hgfast_without_cuda reason)
  if(FORCE_CUDA)
    message(FATAL_ERROR "FORCE_CUDA=1, but ${reason}")
  endif()
  message(WARNING "${reason}")
endfunction()

# The compiler: CUDACXX, then CUDA_HOME or CUDA_PATH, then PATH, then the usual place.
set(CMAKE_CUDA_ARCHITECTURES OFF)  # -gencode flags below: they know 90a in every CMake
if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(HGFAST_NVCC nvcc
    HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin)
  if(HGFAST_NVCC)
    set(CMAKE_CUDA_COMPILER "${HGFAST_NVCC}")
  endif()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  hgfast_without_cuda("no working nvcc: the device code is not built")
  set(CUDA_STATE "not built: no nvcc")
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # torch's
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
set(CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")

# Architectures: sm_80 covers 8.x, sm_90a has wgmma, PTX of the newest carries on from there.
set(CUDA_ARCHS "$ENV{TORCH_CUDA_ARCH_LIST}")
if(CUDA_ARCHS STREQUAL "")
  if(CUDA_VERSION VERSION_GREATER_EQUAL 12.8)
    set(CUDA_ARCHS "8.0;9.0a;10.0+PTX")
  else()
    set(CUDA_ARCHS "8.0;9.0a;9.0+PTX")
  endif()
endif()
string(REGEX REPLACE "[ ,;]+" ";" CUDA_ARCHS "${CUDA_ARCHS}")
set(gencode)
foreach(arch IN LISTS CUDA_ARCHS)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected such as \"8.0;9.0a+PTX\", got \"${arch}\"")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  list(APPEND gencode "--generate-code=arch=compute_${number},code=sm_${number}")
  if(CMAKE_MATCH_3)
    list(APPEND gencode "--generate-code=arch=compute_${number},code=compute_${number}")
  endif()
endforeach()
list(JOIN CUDA_ARCHS " " CUDA_ARCHS)

# hopper_*.cu use instructions that sm_90a alone has.
set(hopper_sources ${CUDA_SOURCES})
list(FILTER hopper_sources INCLUDE REGEX "/hopper_[^/]*$")
list(FILTER CUDA_SOURCES EXCLUDE REGEX "/hopper_[^/]*$")
add_library(hgfast_cuda OBJECT EXCLUDE_FROM_ALL ${CUDA_SOURCES})
target_compile_options(hgfast_cuda PRIVATE ${gencode} -Xcompiler=-Wall)
set(HOPPER OFF)
# Their tensor maps come from the driver through a function that CUDA 12.5 brought.
if(hopper_sources AND CUDA_VERSION VERSION_GREATER_EQUAL 12.5 AND CUDA_ARCHS MATCHES "(^| )9\\.0a")
  set(HOPPER ON)
  add_library(hgfast_cuda_hopper OBJECT EXCLUDE_FROM_ALL ${hopper_sources})
  target_compile_options(hgfast_cuda_hopper PRIVATE
    --generate-code=arch=compute_90a,code=sm_90a -Xcompiler=-Wall)
endif()

string(REGEX MATCH "^[0-9]+" nvcc_major "${CUDA_VERSION}")
string(REGEX MATCH "^[0-9]+" torch_major "${TORCH_CUDA}")
if(TORCH_CUDA STREQUAL "")
  hgfast_without_cuda("torch ${TORCH_VERSION} is a CPU build: no CUDA kernels")
  set(CUDA_STATE "not built: torch is a CPU build")
elseif(NOT nvcc_major STREQUAL torch_major)
  hgfast_without_cuda("nvcc ${CUDA_VERSION} does not fit torch's CUDA ${TORCH_CUDA}: no CUDA kernels")
  set(CUDA_STATE "not built: nvcc ${CUDA_VERSION}, torch has CUDA ${TORCH_CUDA}")
else()
  find_package(CUDAToolkit REQUIRED)
  set(CUDA_STATE "linked")
  set(LINK_CUDA ON)
endif()
