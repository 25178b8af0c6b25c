# The CPU kernels, which know no torch: their sources, flags and instruction sets. CMakeLists.txt
# builds the module from them, tests/portable a program without torch or Python.

get_filename_component(CPU_KERNELS "${CMAKE_CURRENT_LIST_DIR}/../csrc/cpu" ABSOLUTE)
set(KERNEL_SOURCES  # compiled once per instruction set
    bottleneck.cpp conv.cpp upsample_add.cpp pool.cpp concat.cpp add.cpp relayout.cpp decode.cpp
    pack.cpp head.cpp table.cpp)
set(DISPATCH_SOURCES dispatch.cpp)  # picks an instruction set at run time
list(TRANSFORM KERNEL_SOURCES PREPEND "${CPU_KERNELS}/")
list(TRANSFORM DISPATCH_SOURCES PREPEND "${CPU_KERNELS}/")

# ---- Flags ---------------------------------------------------------------------------------------

include(CheckCXXCompilerFlag)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g")
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>)

set(AVX2_FLAGS -mavx2 -mfma -mf16c)
set(AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
    -mprefer-vector-width=512)
set(AMX_FLAGS ${AVX512_FLAGS} -mavx512bf16 -mamx-tile -mamx-bf16)

# ---- Once per instruction set --------------------------------------------------------------------

add_library(hgfast_dispatch OBJECT ${DISPATCH_SOURCES})
set(ISA_SETS)

# hgfast_kernels(NAME FLAG...) compiles KERNEL_SOURCES into the namespace hgfast::cpu::NAME.
# A compiler too old for the flags leaves the set out; dispatch knows what there is.
function(hgfast_kernels name)
  string(TOUPPER "${name}" upper)
  list(JOIN ARGN " " flags)
  check_cxx_compiler_flag("${flags}" HGFAST_COMPILES_${upper})
  if(NOT HGFAST_COMPILES_${upper})
    message(WARNING "this compiler does not know ${flags}: no ${name} kernels")
    return()
  endif()
  add_library(hgfast_${name} OBJECT ${KERNEL_SOURCES})
  # Not contracted: a fused multiply-add rounds once where the kernels' specifications round twice.
  target_compile_options(hgfast_${name} PRIVATE ${ARGN} -fno-exceptions -fno-rtti
    -ffp-contract=off)
  target_compile_definitions(hgfast_${name} PRIVATE HGFAST_ISA=${name})
  target_compile_definitions(hgfast_dispatch PRIVATE HGFAST_ISA_${upper})
  set(ISA_SETS ${ISA_SETS} ${name} PARENT_SCOPE)
endfunction()

hgfast_kernels(portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  hgfast_kernels(avx2 ${AVX2_FLAGS})
  hgfast_kernels(avx512 ${AVX512_FLAGS})
  hgfast_kernels(amx ${AMX_FLAGS})
  if(HGFAST_AMX_MODEL)
    hgfast_kernels(amx_model ${AVX512_FLAGS} -DHGFAST_AMX_MODEL)
  endif()
endif()
message(STATUS "CPU kernels: ${ISA_SETS}")
