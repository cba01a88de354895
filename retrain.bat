@echo off
rem Train on the folders of images in data:   retrain.bat [flags of retrain.py]   or a double click
rem
rem Makes the environment .venv with what requirements.txt names, then runs retrain.py. It trains 200 steps unless a flag
rem says otherwise; what is written lies beside this script, unless a flag names another place.
rem The window stays open at the end; set RETRAIN_NO_PAUSE=1 tells it not to.
setlocal
set "HERE=%~dp0"

rem TensorFlow exists for these versions of Python.
set "SUPPORTED=import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))"
set "ROOM=import shutil, sys; sys.exit(shutil.disk_usage(sys.argv[1]).free < 4e9)"
set "OWN=%HERE%.venv"
set "VENV_PYTHON=%OWN%\Scripts\python.exe"

set "READY="
if not exist "%VENV_PYTHON%" goto install
rem An environment without pip is one whose making was interrupted.
"%VENV_PYTHON%" -c "import pip; %SUPPORTED%" >nul 2>nul
if errorlevel 1 goto install
set "READY=1"
fc /b "%HERE%requirements.txt" "%OWN%\installed.txt" >nul 2>nul
if not errorlevel 1 goto train

:install
set "PYTHON="
for %%P in ("py -3" "py -3.13" "py -3.12" "py -3.11" "py -3.10" "python3" "python") do call :try_python %%P
if not defined PYTHON goto no_python
if not defined READY %PYTHON% -c "%ROOM%" "%HERE%."
if errorlevel 1 (
    echo retrain.bat: error: the disk has less than 4 GB left, which the packages need; free some. 1>&2
    goto failed
)
echo Installing what requirements.txt names into .venv; the first time, this takes some minutes.
if not defined READY if exist "%OWN%" rmdir /s /q "%OWN%"
%PYTHON% -m venv "%OWN%"
if errorlevel 1 (
    echo retrain.bat: error: Python's venv module does not work; install Python anew from https://www.python.org/downloads/ 1>&2
    goto failed
)
"%VENV_PYTHON%" -m pip install --disable-pip-version-check -r "%HERE%requirements.txt"
if errorlevel 1 (
    echo retrain.bat: error: the packages could not be installed, see above; the next run tries again. 1>&2
    goto failed
)
copy /y "%HERE%requirements.txt" "%OWN%\installed.txt" >nul

:train
"%VENV_PYTHON%" "%HERE%retrain.py" --how_many_training_steps 200 %*
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
