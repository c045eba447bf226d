"Packaging: everything that is a fact comes from settings.ini; the tutorials and data travel inside the wheel."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).with_name('settings.ini'))
cfg = config['DEFAULT']

readme = Path(__file__).with_name('README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!\[[^\]]*\])\((?!\w+:|#)', rf"\1({cfg['git_url']}/raw/{cfg['branch']}/", readme)          # a page of the package has no files beside it
readme = re.sub(r'\]\((?!\w+:|#)', rf"]({cfg['git_url']}/blob/{cfg['branch']}/", readme)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    license_files=['LICENSE'], author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    keywords=cfg['keywords'].split(), python_requires=f">={cfg['min_python']}",
    long_description=readme,
    long_description_content_type='text/markdown',
    packages=[*find_packages(include=['lora_nb', 'lora_nb.*']), 'lora_nb._nbs'],
    package_dir={'lora_nb._nbs': 'nbs'},
    package_data={'lora_nb._nbs': ['tutorials/*.ipynb', 'data/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
