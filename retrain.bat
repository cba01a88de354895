@echo off
rem Train on the folders of pictures in data:   retrain.bat [flags of retrain.py]   or a double click
rem
rem Makes the environment .venv with what requirements.txt names, then runs retrain.py with the flags below and yours.
rem Flags of yours come last, so they win. Paths are relative to this folder.
rem The window stays open at the end; set RETRAIN_NO_PAUSE=1 tells it not to.
setlocal
cd /d "%~dp0"

rem TensorFlow exists for these versions of Python.
set "SUPPORTED=import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))"
set "VENV_PYTHON=.venv\Scripts\python.exe"

set "READY="
if not exist "%VENV_PYTHON%" goto install
"%VENV_PYTHON%" -c "%SUPPORTED%" >nul 2>nul
if errorlevel 1 goto install
set "READY=1"
fc /b requirements.txt .venv\installed.txt >nul 2>nul
if not errorlevel 1 goto train

:install
set "PYTHON="
for %%P in ("py -3" "py -3.13" "py -3.12" "py -3.11" "py -3.10" "python3" "python") do call :try_python %%P
if not defined PYTHON goto no_python
echo Installing what requirements.txt names into .venv; the first time, this takes some minutes.
if not defined READY if exist .venv rmdir /s /q .venv
%PYTHON% -m venv .venv
if errorlevel 1 (
    echo retrain.bat: error: Python's venv module does not work; install Python anew from https://www.python.org/downloads/ 1>&2
    goto failed
)
"%VENV_PYTHON%" -m pip install --disable-pip-version-check -r requirements.txt
if errorlevel 1 (
    echo retrain.bat: error: the packages could not be installed, see above; the next run tries again. 1>&2
    goto failed
)
copy /y requirements.txt .venv\installed.txt >nul

:train
"%VENV_PYTHON%" retrain.py --bottleneck_dir bottleneck --how_many_training_steps 200 ^
    --model_dir inception_model --output_graph output_graph.pb --output_labels output_labels.txt %*
set "CODE=%ERRORLEVEL%"
goto finish

:try_python
if defined PYTHON exit /b 0
%~1 -c "%SUPPORTED%" >nul 2>nul
if not errorlevel 1 set "PYTHON=%~1"
exit /b 0

:no_python
set "FOUND="
for /f "delims=" %%V in ('py -3 --version 2^>nul') do set "FOUND=%%V"
if not defined FOUND for /f "delims=" %%V in ('python --version 2^>nul') do set "FOUND=%%V"
if defined FOUND (
    echo retrain.bat: error: %FOUND% is too old or too new for TensorFlow, which needs Python 3.10 to 3.13; install one of these. 1>&2
) else (
    echo retrain.bat: error: there is no Python; install Python 3.10 to 3.13 from https://www.python.org/downloads/ 1>&2
)

:failed
set "CODE=1"

:finish
if not defined RETRAIN_NO_PAUSE pause
exit /b %CODE%
